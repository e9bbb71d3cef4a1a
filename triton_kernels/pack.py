"""Rows of tokens gathered into tiles of layout sm90_tokens, which a GEMM copies in bulk."""

import torch
import triton
import triton.language as tl

from cutemoe.layouts.sm90_tokens import COLUMNS
from cutemoe.triton_kernels import launch

# rows and units of a step of a program; 24576 rows of 4096 in tiles of 128, H200, 2026-11-30:
# 75 us; 16 rows 116, 32 rows 289, 8 units 87; torch fills as many bytes in 61
_ROWS = 8
_UNITS = 4


@launch.entry
@triton.jit
def pack_tiles(
    x_ptr,  # [T, K] 16 bits
    stride_xm,
    sorted_ptr,  # int32 [R]
    tiles_ptr,  # int32 [.., 3]
    count_ptr,  # int32 [1]
    out_ptr,
    K,
    top_k,
    most,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Rows sorted_ptr[r] // top_k of x, tile by tile.

    One program a tile of at most `most` and UNITS units of COLUMNS columns. Tiles are the faster
    dimension: what is read of x meanwhile, each row top_k times, fits into L2.
    """
    tile = tl.program_id(0) % most
    if tile >= tl.load(count_ptr):
        return
    expert = tl.load(tiles_ptr + 3 * tile)
    first = tl.load(tiles_ptr + 3 * tile + 1)
    n = tl.load(tiles_ptr + 3 * tile + 2)
    eights = tl.cdiv(n, 8)
    out = out_ptr + (first // 8 + tl.minimum(expert, tile)).to(tl.int64) * 8 * K
    # pieces of 8 columns, which a thread moves at once
    PIECES: tl.constexpr = UNITS * COLUMNS // 8
    piece = (tl.program_id(0) // most) * PIECES + tl.arange(0, PIECES)
    column = piece[None, :, None] * 8 + tl.arange(0, 8)[None, None, :]
    inside = (piece * 8 < K)[None, :, None]
    for done in range(0, n, ROWS):
        r = done + tl.arange(0, ROWS)
        mask = inside & (r < n)[:, None, None]
        slot = tl.load(sorted_ptr + first + r, mask=r < n, other=0)
        row = x_ptr + (slot // top_k).to(tl.int64) * stride_xm
        x = tl.load(row[:, None, None] + column, mask=mask)
        # [unit, group of 8 rows, row, piece]
        at = (piece // (COLUMNS // 8) * eights)[None, :] + (r // 8)[:, None]
        at = at * 8 + (r % 8)[:, None]
        at = at * (COLUMNS // 8) + ((piece % 8)[None, :] ^ (r % 8)[:, None])
        to = out + at[:, :, None] * 8 + tl.arange(0, 8)[None, None, :]
        tl.store(to, x, mask=mask, cache_modifier=".cs")


def pack(
    x: torch.Tensor,
    out: torch.Tensor,
    top_k: int,
    most: int,
    work: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """x [T, K] of 16 bits, K a multiple of 64 -> out [8 * eights, K] of layout sm90_tokens.

    Args:
        most: tiles that there can be.
        work: sorted slots, tiles and their count, as sort.py writes them.
    """
    width = x.shape[1]
    pack_tiles[(most * -(-width // (_UNITS * COLUMNS)),)](
        x,
        x.stride(0),
        *work,
        out,
        width,
        top_k,
        most,
        ROWS=_ROWS,
        UNITS=_UNITS,
        COLUMNS=COLUMNS,
        **launch.options(4),
    )
