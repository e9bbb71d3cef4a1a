"""The tensors of one grouped GEMM call, as back ends receive them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cutemoe.gemm.weight import PackedWeight

# the list of tiles starts 256 bytes behind their number
_FIRST = 64


@dataclass(frozen=True, eq=False)
class GemmTensors:
    """R rows, G groups, N outputs, Kdim inputs.

    Attributes:
        x: [R, Kdim] bf16, fp16 or float8_e4m3fn, last dimension contiguous.
        w: the weights [G, N, Kdim].
        offsets: int32 [G+1] contiguous; group g owns rows offsets[g] to offsets[g+1].
        x_scale: float32, [] or [R] contiguous; None is 1.
        out: [R, N] bf16 or fp16, last dimension contiguous.
        scratch: uint8 [tile_bytes(..)] for the list of tiles, or None.
    """

    x: torch.Tensor
    w: PackedWeight
    offsets: torch.Tensor
    x_scale: torch.Tensor | None
    out: torch.Tensor
    scratch: torch.Tensor | None = None

    def tiles(self, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for the number of tiles, int32 [1], and for at most so many, int32 [most, 3]."""
        scratch = self.scratch
        if scratch is None:
            scratch = torch.empty(tile_bytes(most), dtype=torch.uint8, device=self.x.device)
        words = scratch.view(torch.int32)
        return words[:1], words[_FIRST : _FIRST + 3 * most].view(most, 3)


def tile_bytes(most: int) -> int:
    """Scratch memory for at most so many tiles."""
    return 4 * (_FIRST + 3 * most)
