"""From expert ids to sorted rows and tiles of rows; no atomics, the same bits in every run.

Few rows: one kernel, one program an expert. Every program counts all ids, so it knows where its
rows and its tiles start without waiting for another; then it writes its own. A launch costs more
than counting again.

Many rows: the ids are cut into chunks. One kernel counts the ids of each chunk; in the next every
program adds the counts up and places the ids of its chunk.
"""

import torch
import triton
import triton.language as tl

from cutemoe.triton_kernels import launch, pdl

# most rows for one kernel; measured on one H200, 2026-11: 2.6 us at 384 rows, 19 us at 6144
_FEW = 2048
# ids ranked together, and most chunks
_STEP = 128
_CHUNKS = 128
# counts of chunks that a program loads at once
_COUNTS = 4096


@launch.entry
@triton.jit(do_not_specialize=["R"])
def sort_slots(
    ids_ptr,  # [T, K] int32 or int64
    stride_it,
    sorted_ptr,  # int32 [R]
    start_ptr,  # int32 [E + 1]
    tiles_ptr,  # int32 [.., 3]
    count_ptr,  # int32 [1]
    R,
    top_k,
    expert_offset,
    E,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Slots of every expert in ascending order, where each expert starts, and the tiles.

    Ids outside expert_offset .. expert_offset + E - 1 are skipped. BLOCK >= R; program: expert.
    """
    pdl.results_of_the_last_kernel(PDL)
    expert = tl.program_id(0)
    bins = tl.arange(0, BINS)
    slots = tl.arange(0, BLOCK)
    local, live = _local_ids(ids_ptr, stride_it, slots, R, top_k, expert_offset, E)
    counts = tl.histogram(local, BINS, mask=live)
    start = tl.sum(tl.where(bins < expert, counts, 0))
    _write_expert(start_ptr, tiles_ptr, count_ptr, counts, bins, expert, start, E, TILE)
    own = live & (local == expert)
    rank = tl.cumsum(own.to(tl.int32), 0) - 1
    tl.store(sorted_ptr + start + rank, slots, mask=own)


@launch.entry
@triton.jit(do_not_specialize=["R", "steps"])
def count_chunks(
    ids_ptr,
    stride_it,
    counts_ptr,  # int32 [chunks, E]
    R,
    top_k,
    expert_offset,
    E,
    steps,
    STEP: tl.constexpr,
    BINS: tl.constexpr,
    PDL: tl.constexpr,
):
    """How many ids of every expert a chunk of steps * STEP ids has; program: chunk."""
    pdl.results_of_the_last_kernel(PDL)
    chunk = tl.program_id(0)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int32)
    for step in range(0, steps):
        slots = (chunk * steps + step) * STEP + tl.arange(0, STEP)
        local, live = _local_ids(ids_ptr, stride_it, slots, R, top_k, expert_offset, E)
        counts += tl.histogram(local, BINS, mask=live)
    tl.store(counts_ptr + chunk * E + bins, counts, mask=bins < E)


@launch.entry
@triton.jit(do_not_specialize=["R", "steps"])
def place_chunks(
    ids_ptr,
    stride_it,
    counts_ptr,
    sorted_ptr,
    start_ptr,
    tiles_ptr,
    count_ptr,
    R,
    top_k,
    expert_offset,
    E,
    steps,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    BINS: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    """What sort_slots does, from the counts of every chunk; program: chunk."""
    pdl.results_of_the_last_kernel(PDL)
    chunk = tl.program_id(0)
    chunks = tl.num_programs(0)
    bins = tl.arange(0, BINS)
    sums = tl.zeros((AT_ONCE, BINS), tl.int32)
    before = tl.zeros((AT_ONCE, BINS), tl.int32)
    for first in range(0, chunks, AT_ONCE):
        c = first + tl.arange(0, AT_ONCE)[:, None]
        mask = (c < chunks) & (bins < E)[None, :]
        counts = tl.load(counts_ptr + c * E + bins[None, :], mask=mask, other=0)
        sums += counts
        before += tl.where(c < chunk, counts, 0)
    total, earlier = tl.sum(sums, 0), tl.sum(before, 0)
    starts = tl.cumsum(total, 0) - total
    for expert in range(chunk, E, chunks):
        start = tl.sum(tl.where(bins == expert, starts, 0))
        _write_expert(start_ptr, tiles_ptr, count_ptr, total, bins, expert, start, E, TILE)
    base = starts + earlier
    at = tl.arange(0, STEP)
    for step in range(0, steps):
        slots = (chunk * steps + step) * STEP + at
        local, live = _local_ids(ids_ptr, stride_it, slots, R, top_k, expert_offset, E)
        key = tl.where(live, local, -1)
        same = (key[:, None] == tl.reshape(key, (1, STEP))) & (at[None, :] < at[:, None])
        rank = tl.sum(same.to(tl.int32), 1)
        tl.store(sorted_ptr + tl.gather(base, local, 0) + rank, slots, mask=live)
        base += tl.histogram(local, BINS, mask=live)


@triton.jit
def _write_expert(
    start_ptr, tiles_ptr, count_ptr, counts, bins, expert, start, E, TILE: tl.constexpr
):
    """Start and tiles of one expert, and behind the last the ends, from the counts of all."""
    mine = tl.sum(tl.where(bins == expert, counts, 0))
    tile = tl.sum(tl.where(bins < expert, tl.cdiv(counts, TILE), 0))
    _write_tiles(tiles_ptr, tile, expert, start, mine, TILE)
    tl.store(start_ptr + expert, start)
    if expert == E - 1:
        tl.store(start_ptr + E, start + mine)
        tl.store(count_ptr, tile + tl.cdiv(mine, TILE))


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
    """(expert, first row, rows) of every tile of `rows` rows from `start`, at tile, tile + 1, .."""
    offs = tl.arange(0, 32)
    for first in range(0, tl.cdiv(rows, TILE), 32):
        n = first + offs
        mask = n < tl.cdiv(rows, TILE)
        at = tiles_ptr + 3 * (tile + n)
        tl.store(at, tl.zeros((32,), tl.int32) + expert, mask=mask)
        tl.store(at + 1, start + n * TILE, mask=mask)
        tl.store(at + 2, tl.minimum(rows - n * TILE, TILE), mask=mask)


@launch.entry
@triton.jit(do_not_specialize=["R"])
def tile_groups(
    offsets_ptr,  # int32 [G + 1]
    tiles_ptr,
    count_ptr,
    R,
    G,
    TILE: tl.constexpr,
    BINS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Tiles of the rows of every group, and of the rows behind the last as expert ~G.

    Offsets are clamped to 0 .. R. One program a group and one more.
    """
    pdl.results_of_the_last_kernel(PDL)
    group = tl.program_id(0)
    bins = tl.arange(0, BINS)
    lower = _clamped(offsets_ptr, bins, G, R)
    upper = _clamped(offsets_ptr, bins + 1, G, R)
    counts = tl.where(bins <= G, tl.maximum(upper - lower, 0), 0)
    own = bins == group
    start = tl.sum(tl.where(own, lower, 0))
    mine = tl.sum(tl.where(own, counts, 0))
    tile = tl.sum(tl.where(bins < group, tl.cdiv(counts, TILE), 0))
    if group == G:
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
    rows: tuple[torch.Tensor, ...],
    scratch: torch.Tensor,
) -> None:
    """Sorts ids [T, K] by expert.

    Args:
        tile: most rows of a tile.
        rows: sorted_slots, expert_start, tiles and tile_count, int32; workspace.py has the shapes.
        scratch: memory of at least R * E / 128 + E elements of four bytes, for many rows.
    """
    sorted_slots, expert_start, tiles, tile_count = rows
    total, top_k = ids.numel(), ids.shape[1]
    bins, early = max(2, launch.power_of_2(experts)), pdl.dependent(ids)
    if total <= _FEW:
        sort_slots[(experts,)](
            ids,
            ids.stride(0),
            sorted_slots,
            expert_start,
            tiles,
            tile_count,
            total,
            top_k,
            expert_offset,
            experts,
            TILE=tile,
            BLOCK=max(64, launch.power_of_2(total)),
            BINS=bins,
            PDL=early,
            **launch.options(4, pdl=early),
        )
        return
    steps = -(-total // (_STEP * _CHUNKS))
    chunks = -(-total // (_STEP * steps))
    counts = scratch.view(-1).view(torch.int32)[: chunks * experts]
    numbers = (total, top_k, expert_offset, experts, steps)
    count_chunks[(chunks,)](
        ids,
        ids.stride(0),
        counts,
        *numbers,
        STEP=_STEP,
        BINS=bins,
        PDL=early,
        **launch.options(4, pdl=early),
    )
    place_chunks[(chunks,)](
        ids,
        ids.stride(0),
        counts,
        sorted_slots,
        expert_start,
        tiles,
        tile_count,
        *numbers,
        TILE=tile,
        STEP=_STEP,
        BINS=bins,
        AT_ONCE=max(1, min(16, _COUNTS // bins)),
        PDL=early,
        **launch.options(4, pdl=early),
    )


def sort_groups(
    offsets: torch.Tensor,
    rows: int,
    tile: int,
    tiles: torch.Tensor,
    count: torch.Tensor,
) -> None:
    """Tiles of `rows` rows in groups; tiles and count as in `sort`."""
    groups, early = offsets.numel() - 1, pdl.dependent(offsets)
    tile_groups[(groups + 1,)](
        offsets,
        tiles,
        count,
        rows,
        groups,
        TILE=tile,
        BINS=launch.power_of_2(groups + 1),
        PDL=early,
        **launch.options(4, pdl=early),
    )
