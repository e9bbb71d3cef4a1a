"""Tiles of tokens: none overlaps another, all fit, packing loses nothing."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from cutemoe.layouts import sm90_tokens
from tests import strategies as draw
from tests.close import assert_same


@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    eighths=st.integers(1, 4),
)
def test_tiles_are_apart_and_fit(counts, eighths):
    most, end, first, tile = 8 * eighths, 0, 0, 0
    for expert, count in enumerate(counts):
        for done in range(0, count, most):
            n = min(most, count - done)
            begin = sm90_tokens.start(first + done, expert, tile)
            assert begin >= end
            end = begin + -(-n // 8)
            tile += 1
        first += count
    assert end <= sm90_tokens.eights(first, len(counts))


@given(n=st.integers(1, 40), units=st.integers(1, 3), seed=draw.seeds())
def test_a_tile_unpacks_to_its_rows(n, units, seed):
    x = draw.normal((n, 64 * units), seed).bfloat16()
    tile = sm90_tokens.pack(x)
    assert tile.shape == (-(-n // 8) * 8, 64 * units)
    assert_same(sm90_tokens.unpack(tile, n), x)


def test_where_a_value_sits():
    """Column 64 u + 8 p + c of row 8 i + r, in a tile of two groups of rows and two units."""
    x = torch.arange(16 * 128).view(16, 128)
    tile = sm90_tokens.pack(x).flatten()
    u, i, r, p, c = 1, 1, 5, 6, 3
    at = (((u * 2 + i) * 8 + r) * 8 + (p ^ r)) * 8 + c
    assert tile[at] == x[8 * i + r, 64 * u + 8 * p + c]
