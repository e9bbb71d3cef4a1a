"""Activations of 16 bits in the order in which wgmma reads them from shared memory on SM90.

A tile of n rows of an expert is cut into units of 64 columns; a unit is what the tile's part of a
pipeline stage looks like, so that one bulk copy of one thread brings it, where rows that are apart
take a copy for every 16 bytes. What a tile lacks of 8 rows is never read.

    x    [8 * eights(R, E), K], K a multiple of 64, R sorted rows of E experts in tiles
    tile [unit K/64][8 rows ceil(n/8)][row 8][piece 8 of 8 columns], its piece p of row r at p ^ r

Tiles begin at multiples of 8 rows, in their order. Tile t, of expert e and from sorted row `first`
on, begins at 8 * (first // 8 + min(e, t)): behind a tile of the same expert there is no gap, as
tiles but an expert's last have multiples of 8 rows; behind another's the 8 rows that both minima
and the quotients leave are enough for what is rounded up.
"""

from __future__ import annotations

import torch

COLUMNS = 64


def eights(rows: int, experts: int) -> int:
    """Groups of 8 rows that tiles of so many sorted rows can take."""
    return rows // 8 + min(experts, rows)


def start(first: int, expert: int, tile: int) -> int:
    """The group of 8 rows where a tile begins."""
    return first // 8 + min(expert, tile)


def pack(x: torch.Tensor) -> torch.Tensor:
    """The rows [n, K] of a tile -> the tile, [8 * ceil(n/8), K]; rows that it lacks are 0."""
    n, K = x.shape
    whole = torch.nn.functional.pad(x, (0, 0, 0, -n % 8))
    units = whole.view(-1, 8, K // COLUMNS, 8, 8).permute(2, 0, 1, 3, 4)
    return _swizzled(units).reshape(-1, K)


def unpack(tile: torch.Tensor, n: int) -> torch.Tensor:
    """The inverse of `pack`."""
    K = tile.shape[1]
    units = _swizzled(tile.reshape(K // COLUMNS, -1, 8, 8, 8))
    return units.permute(1, 2, 0, 3, 4).reshape(-1, K)[:n]


def _swizzled(units: torch.Tensor) -> torch.Tensor:
    """[.., row 8, piece 8, 8] with the pieces of every row exchanged; its own inverse."""
    each = torch.arange(8, device=units.device)
    at = (each[:, None] ^ each)[:, :, None].expand(units.shape)
    return torch.gather(units, -2, at)
