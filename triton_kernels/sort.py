"""From expert ids to sorted rows and tiles of rows: one kernel, one program an expert.

Every program counts all ids, so it knows where its rows and its tiles start without waiting for
another; then it writes its own. No atomics on memory, the same bits in every run.

Rejected: one program for everything (its scan is serial), and a histogram kernel before a scatter
kernel (a launch costs more than counting twice).
"""

import torch
import triton
import triton.language as tl

from cutemoe.triton_kernels import launch

# ids a program looks at together
_BLOCK = 2048


@triton.jit
def sort_slots(
    ids_ptr,  # [T, K] int32 or int64
    stride_it,
    sorted_ptr,  # int32 [R]
    start_ptr,  # int32 [E + 1]
    tiles_ptr,  # int32 [.., 2]
    count_ptr,  # int32 [1]
    R,
    top_k,
    expert_offset,
    E,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Slots of every expert in ascending order, where each expert starts, and the tiles.

    Ids outside expert_offset .. expert_offset + E - 1 are skipped. ONCE: BLOCK >= R.
    """
    launch.after_previous(PDL)
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    offs = tl.arange(0, BLOCK)
    counts = tl.zeros((BINS,), tl.int32)
    local, live = _local_ids(ids_ptr, stride_it, offs, R, top_k, expert_offset, E)
    if ONCE:
        counts += tl.histogram(local, BINS, mask=live)
    else:
        for first in range(0, R, BLOCK):
            local, live = _local_ids(ids_ptr, stride_it, first + offs, R, top_k, expert_offset, E)
            counts += tl.histogram(local, BINS, mask=live)
    before = bins < expert
    start = tl.sum(tl.where(before, counts, 0))
    mine = tl.sum(tl.where(bins == expert, counts, 0))
    tile = tl.sum(tl.where(before, tl.cdiv(counts, TILE), 0))
    _write_tiles(tiles_ptr, tile, expert, start, mine, TILE)
    tl.store(start_ptr + expert, start)
    if expert == E - 1:
        tl.store(start_ptr + E, start + mine)
        tl.store(count_ptr, tile + tl.cdiv(mine, TILE))
    if ONCE:
        own = live & (local == expert)
        rank = tl.cumsum(own.to(tl.int32), 0) - 1
        tl.store(sorted_ptr + start + rank, offs, mask=own)
    else:
        for first in range(0, R, BLOCK):
            local, live = _local_ids(ids_ptr, stride_it, first + offs, R, top_k, expert_offset, E)
            own = live & (local == expert)
            rank = tl.cumsum(own.to(tl.int32), 0) - 1
            tl.store(sorted_ptr + start + rank, first + offs, mask=own)
            start += tl.sum(own.to(tl.int32))


@triton.jit
def _local_ids(ids_ptr, stride_it, slots, R, top_k, expert_offset, E):
    """Local experts int32 of these slots, and which are live."""
    # slots wrap where R is near 2^31
    inside = (slots >= 0) & (slots < R)
    at = (slots // top_k).to(tl.int64) * stride_it + slots % top_k
    ids = tl.load(ids_ptr + at, mask=inside, other=-1)
    # no id is subtracted from unless it is in range
    live = inside & (ids >= expert_offset) & (ids < expert_offset + E)
    return tl.where(live, ids - expert_offset, 0).to(tl.int32), live


@triton.jit
def _write_tiles(tiles_ptr, tile, expert, start, rows, TILE: tl.constexpr):
    """(expert, first row) for every TILE of `rows` rows from `start`, at tile, tile + 1, .."""
    offs = tl.arange(0, 32)
    for first in range(0, tl.cdiv(rows, TILE), 32):
        n = first + offs
        mask = n < tl.cdiv(rows, TILE)
        at = tiles_ptr + 2 * (tile + n)
        tl.store(at, tl.zeros((32,), tl.int32) + expert, mask=mask)
        tl.store(at + 1, start + n * TILE, mask=mask)


@triton.jit
def tile_groups(
    offsets_ptr,  # int32 [G + 1]
    start_ptr,  # int32 [G + 2]
    tiles_ptr,
    count_ptr,
    R,
    G,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles of the rows of every group, and of the rows behind the last as expert ~G.

    Offsets are clamped to 0 .. R; start_ptr receives them, and R. One program a group and one more.
    """
    launch.after_previous(PDL)
    group = tl.program_id(0)
    bins = tl.arange(0, BINS)
    lower = _clamped(offsets_ptr, bins, G, R)
    upper = _clamped(offsets_ptr, bins + 1, G, R)
    counts = tl.where(bins <= G, tl.maximum(upper - lower, 0), 0)
    own = bins == group
    start = tl.sum(tl.where(own, lower, 0))
    mine = tl.sum(tl.where(own, counts, 0))
    tile = tl.sum(tl.where(bins < group, tl.cdiv(counts, TILE), 0))
    tl.store(start_ptr + group, start)
    if group == G:
        tl.store(start_ptr + G + 1, R)
        tl.store(count_ptr, tile + tl.cdiv(mine, TILE))
        group = -1 - group
    _write_tiles(tiles_ptr, tile, group, start, mine, TILE)


@triton.jit
def _clamped(offsets_ptr, at, G, R):
    """Offsets at `at`, those behind the last R."""
    o = tl.load(offsets_ptr + at, mask=at <= G, other=0)
    return tl.where(at <= G, tl.minimum(tl.maximum(o, 0), R), R)


def sort(
    ids: torch.Tensor,
    experts: int,
    expert_offset: int,
    tile: int,
    sorted_slots: torch.Tensor,
    expert_start: torch.Tensor,
    tiles: torch.Tensor,
    tile_count: torch.Tensor,
) -> None:
    """Fills the four int32 outputs (workspace.py says what they are) for ids [T, K]."""
    rows, top_k = ids.numel(), ids.shape[1]
    block = max(64, min(_BLOCK, triton.next_power_of_2(rows)))
    pdl = launch.has_pdl(ids.device)
    sort_slots[(experts,)](
        ids,
        ids.stride(0),
        sorted_slots,
        expert_start,
        tiles,
        tile_count,
        rows,
        top_k,
        expert_offset,
        experts,
        TILE=tile,
        BLOCK=block,
        BINS=max(2, triton.next_power_of_2(experts)),
        ONCE=block >= rows,
        PDL=pdl,
        **launch.options(4, 1, pdl),
    )


def sort_groups(
    offsets: torch.Tensor,
    rows: int,
    tile: int,
    start: torch.Tensor,
    tiles: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """Tiles of `rows` rows in groups; start int32 [G + 2], tiles and count as in `sort`."""
    groups = offsets.numel() - 1
    pdl = launch.has_pdl(offsets.device)
    tile_groups[(groups + 1,)](
        offsets,
        start,
        tiles,
        count,
        rows,
        groups,
        TILE=tile,
        BINS=triton.next_power_of_2(groups + 1),
        PDL=pdl,
        **launch.options(4, 1, pdl),
    )
