"""Gathered rows in tiles against the layout's own definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutemoe.layouts import sm90_tokens
from tests import strategies as draw
from tests.close import assert_same

pack = pytest.importorskip("cutemoe.triton_kernels.pack", reason="triton is not installed")


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    units=st.integers(1, 6),
    top_k=st.integers(1, 3),
    tile=st.sampled_from([8, 24]),
    padding=st.sampled_from([0, 3, 8]),
    seed=draw.seeds(),
)
def test_tiles_of_gathered_rows(counts, units, top_k, tile, padding, seed):
    rows, width = sum(counts), 64 * units
    tokens = -(-max(rows, 1) // top_k)
    x = draw.normal((tokens, width + padding), seed).bfloat16()[:, :width]
    order = torch.randperm(tokens * top_k, generator=draw.generator(seed))[:rows]
    tiles, first = [], 0
    for expert, count in enumerate(counts):
        tiles += [[expert, first + i, min(tile, count - i)] for i in range(0, count, tile)]
        first += count
    most, guard = len(tiles) + 2, -7.0
    out = torch.full((8 * sm90_tokens.eights(rows, len(counts)), width), guard).bfloat16()
    listed = torch.tensor([*tiles, *[[9999, 9999, 9999]] * 2], dtype=torch.int32)
    count = torch.tensor([len(tiles)], dtype=torch.int32)
    pack.pack(x, out, top_k, most, (order.to(torch.int32), listed, count))
    want = torch.full_like(out, guard)
    for t, (expert, first, n) in enumerate(tiles):
        begin = 8 * sm90_tokens.start(first, expert, t)
        picked = x[order[first : first + n] // top_k]
        # where a tile lacks rows of 8, nothing is written
        missing = sm90_tokens.pack(torch.ones_like(picked)) == 0
        want[begin : begin + len(missing)] = sm90_tokens.pack(picked).masked_fill(missing, guard)
    assert_same(out, want)
