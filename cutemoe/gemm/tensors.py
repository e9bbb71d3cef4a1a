"""The tensors of one grouped GEMM call, as back ends receive them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

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
        scratch: int32 [1] and [.., 3] for the number of tiles and as many tiles as there may be,
            or None.
    """

    x: torch.Tensor
    w: PackedWeight
    offsets: torch.Tensor
    x_scale: torch.Tensor | None
    out: torch.Tensor
    scratch: tuple[torch.Tensor, torch.Tensor] | None = None

    def tiles(self, most: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scratch memory for the number of tiles and for that many tiles."""
        if self.scratch is not None:
            return self.scratch
        kind: dict[str, Any] = {"dtype": torch.int32, "device": self.x.device}
        return torch.empty(1, **kind), torch.empty(most, 3, **kind)

    def with_scratch(self, most: int) -> GemmTensors:
        """The same, with scratch memory of its own."""
        return replace(self, scratch=self.tiles(most))

    def roles(self) -> list[torch.Tensor | None]:
        """Every tensor, in one order."""
        w = self.w
        fixed = (self.x, self.offsets, self.x_scale, self.out, w.data, w.scale, w.factor)
        return [*fixed, *(self.scratch or ())]
