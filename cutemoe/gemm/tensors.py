"""The tensors of one grouped GEMM call, as back ends receive them."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    x: torch.Tensor
    w: PackedWeight
    offsets: torch.Tensor
    x_scale: torch.Tensor | None
    out: torch.Tensor
