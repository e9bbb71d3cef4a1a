"""Layout "sm120_block_scale": block scales as the block-scaled MMA of SM100 and SM120 reads them.

Scale of row r, k-block b of a row of KB blocks, byte offset:

    ((r / 128) * ceil(KB / 4) + b / 4) * 512 + (r % 32) * 16 + ((r % 128) / 32) * 4 + b % 4

One 32-bit word holds the 4 scales of a row for one MMA step of K = 64 (nvfp4) or 128 (mxfp4), and
is the scale register as the instruction takes it. Rows are padded to 128, k-blocks to 4.
"""

import torch

from cutemoe.layouts.layout import Layout, Shape


def _padded(shape: Shape) -> Shape:
    *lead, rows, blocks = shape
    return (*lead, -(-rows // 128), -(-blocks // 4), 32, 4, 4)


def _move(x: torch.Tensor) -> torch.Tensor:
    *lead, row_tiles, block_tiles, _, _, _ = _padded(tuple(x.shape))
    wide = x.new_zeros((*lead, row_tiles * 128, block_tiles * 4))
    wide[..., : x.shape[-2], : x.shape[-1]] = x
    # row = 128 * tile + 32 * quarter + lane
    tiles = wide.view(*lead, row_tiles, 4, 32, block_tiles, 4)
    return tiles.movedim((-2, -3, -4), (-4, -3, -2))


def _restore(packed: torch.Tensor, shape: Shape) -> torch.Tensor:
    *lead, row_tiles, block_tiles, _, _, _ = packed.shape
    tiles = packed.movedim((-4, -3, -2), (-2, -3, -4))
    wide = tiles.reshape(*lead, row_tiles * 128, block_tiles * 4)
    return wide[..., : shape[-2], : shape[-1]]


SM120_BLOCK_SCALE = Layout(
    name="sm120_block_scale", rows=1, columns=1, move=_move, restore=_restore, moved=_padded
)
