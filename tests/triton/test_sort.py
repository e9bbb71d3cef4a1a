"""Sorted rows and tiles against a stable sort in torch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutemoe.moe.workspace import max_tiles
from tests import strategies as draw

sort = pytest.importorskip("cutemoe.triton_kernels.sort", reason="triton is not installed")

GUARD = -9


def scratch(rows: int, experts: int) -> tuple[torch.Tensor, ...]:
    """Outputs of `sort`, full of guards."""
    sizes = ((rows,), (experts + 1,), (max_tiles(rows, experts), 3), (1,))
    return tuple(torch.full(size, GUARD, dtype=torch.int32) for size in sizes)


def expected(local: torch.Tensor, experts: int, tile: int):
    """Slots, starts and tiles of flat local ids; an id outside 0 .. experts - 1 is skipped."""
    live = (local >= 0) & (local < experts)
    order = torch.where(live, local, experts).argsort(stable=True)[: int(live.sum())]
    start = torch.zeros(experts + 1, dtype=torch.int64)
    start[1:] = torch.bincount(local[live], minlength=experts).cumsum(0)
    tiles = [
        [e, first, min(tile, int(start[e + 1]) - first)]
        for e in range(experts)
        for first in range(int(start[e]), int(start[e + 1]), tile)
    ]
    return order, start, tiles


@given(
    T=st.integers(1, 60),
    K=st.integers(1, 8),
    E=st.integers(1, 9),
    offset=st.sampled_from([0, 3]),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    tile=st.sampled_from([8, 16]),
    padding=st.integers(0, 3),
    seed=draw.seeds(),
)
def test_rows_and_tiles(T, K, E, offset, dtype, tile, padding, seed):
    ids = torch.randint(-2, E + offset + 3, (T, K + padding), generator=draw.generator(seed))
    ids[0, 0], ids[-1, K - 1] = torch.iinfo(dtype).max, torch.iinfo(dtype).min
    ids = ids.to(dtype)[:, :K]
    got = scratch(T * K, E)
    sort.sort(ids, E, offset, tile, got, torch.empty(0))
    wide = ids.flatten().double() - offset
    order, start, tiles = expected(wide.clamp(-1, E).long(), E, tile)
    slots, starts, tile_list, count = got
    assert slots[: len(order)].tolist() == order.tolist()
    assert (slots[len(order) :] == GUARD).all()
    assert starts.tolist() == start.tolist()
    assert count.tolist() == [len(tiles)]
    assert tile_list[: len(tiles)].tolist() == tiles
    assert (tile_list[len(tiles) :] == GUARD).all()


@pytest.mark.parametrize("experts", [3, 40])
@pytest.mark.parametrize("rows", [2047, 2048, 2049, 16500])
def test_more_rows_than_a_program_holds(rows, experts):
    ids = torch.randint(-1, experts + 1, (rows, 1), generator=draw.generator(rows))
    got = scratch(rows, experts)
    sort.sort(ids.int(), experts, 0, 64, got, torch.empty(rows * experts // 128 + experts))
    order, start, tiles = expected(ids.flatten(), experts, 64)
    assert got[0][: len(order)].tolist() == order.tolist()
    assert (got[0][len(order) :] == GUARD).all()
    assert got[1].tolist() == start.tolist()
    assert got[2][: len(tiles)].tolist() == tiles and got[3].tolist() == [len(tiles)]


@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    tail=st.integers(-20, 40),
    tile=st.sampled_from([8, 16]),
)
def test_groups(sizes, tail, tile):
    """A negative tail is offsets beyond the rows there are."""
    rows = max(sum(sizes) + tail, 1)
    offsets = torch.tensor([0, *sizes]).cumsum(0).int()
    groups = len(sizes)
    most = min(groups + 1, rows) + rows // tile
    tiles = torch.full((most, 3), GUARD, dtype=torch.int32)
    count = torch.full((1,), GUARD, dtype=torch.int32)
    sort.sort_groups(offsets, rows, tile, tiles, count)
    bounds = [*offsets.clamp(max=rows).tolist(), rows]
    want = [
        [g if g < groups else -1 - groups, first, min(tile, bounds[g + 1] - first)]
        for g in range(groups + 1)
        for first in range(bounds[g], bounds[g + 1], tile)
    ]
    assert count.tolist() == [len(want)] and tiles[: len(want)].tolist() == want
    assert (tiles[len(want) :] == GUARD).all()
