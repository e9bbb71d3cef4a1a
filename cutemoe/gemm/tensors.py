"""The tensors of one grouped GEMM call, as back ends receive them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from cutemoe.gemm.weight import PackedWeight


@dataclass(frozen=True, eq=False)
class GemmTensors:
    """R rows, G groups, N outputs, Kdim inputs.

    Attributes:
        x: [R, Kdim] bf16, fp16 or float8_e4m3fn, last dimension contiguous.
        w: the weights [G, N, Kdim].
        offsets: int32 [G+1] contiguous; group g owns rows offsets[g] to offsets[g+1].
        x_scale: float32, [] or [R] contiguous; None is 1.
        out: [R, N] bf16 or fp16, last dimension contiguous.
        scratch: int32, of sufficient size for `tiles`, or None.
    """

    x: torch.Tensor
    w: PackedWeight
    offsets: torch.Tensor
    x_scale: torch.Tensor | None
    out: torch.Tensor
    scratch: torch.Tensor | None = None

    def tiles(self, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scratch memory for the number of tiles [1] and for the tiles [most, 3], int32."""
        scratch = self.scratch
        if scratch is None:
            scratch = torch.empty(4 + 3 * most, dtype=torch.int32, device=self.x.device)
        return scratch[:1], scratch[4 : 4 + 3 * most].view(most, 3)

    def with_scratch(self, most: int) -> GemmTensors:
        """The same, with scratch memory for that many tiles where none was given."""
        if self.scratch is not None:
            return self
        empty = torch.empty(4 + 3 * most, dtype=torch.int32, device=self.x.device)
        return replace(self, scratch=empty)

    def roles(self) -> list[torch.Tensor | None]:
        """Every tensor, in one order."""
        w = self.w
        fixed = (self.x, self.offsets, self.x_scale, self.out, self.scratch)
        return [*fixed, w.data, w.scale, w.factor]
