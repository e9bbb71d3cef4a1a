"""The tensors of one MoE layer or routing call, as back ends receive them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cutemoe.gemm.weight import PackedWeight


@dataclass(frozen=True, eq=False)
class MoETensors:
    """T tokens, H hidden, I intermediate, E local experts, K slots a token.

    Attributes:
        x: [T, H] bf16 or fp16, last dimension contiguous.
        ids: [T, K] int32 or int64, last dimension contiguous.
        weights: [T, K] float32, or with rounding "eager" of the dtype of x; last dimension
            contiguous.
        out: [T, H] of the dtype of x, last dimension contiguous.
        w13: [E, 2I, H] gated or [E, I, H] ungated, rows in the order of `gate_up`.
        w2: [E, H, I].
        b13: float32 [E, 2I] or [E, I] in the row order of w13, contiguous, or None.
        b2: float32 [E, H] contiguous, or None.
        input_scale1, input_scale2: float32 [E] contiguous. nvfp4 activations: the global
            dequantisation multipliers d of the FC1 and FC2 inputs, never None. fp8: the static
            scales, or None for one scale a row. Otherwise None.
        alpha, beta, limit: of SwiGLU: a number or float32 [E] contiguous; limit None is no clamp.
        workspace: uint8, one dimension, 256-byte aligned parts (workspace.py), or None.
    """

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    out: torch.Tensor
    w13: PackedWeight
    w2: PackedWeight
    b13: torch.Tensor | None
    b2: torch.Tensor | None
    input_scale1: torch.Tensor | None
    input_scale2: torch.Tensor | None
    alpha: float | torch.Tensor
    beta: float | torch.Tensor
    limit: float | torch.Tensor | None
    workspace: torch.Tensor | None

    def scratch(self, nbytes: int) -> torch.Tensor:
        """The workspace, or that much memory where none was given."""
        if self.workspace is not None:
            return self.workspace
        return torch.empty(nbytes, dtype=torch.uint8, device=self.x.device)


@dataclass(frozen=True, eq=False)
class RouteTensors:
    """T tokens, E experts, K slots.

    Attributes:
        logits: [T, E] float32, bf16 or fp16, last dimension contiguous.
        bias: [E] of any floating dtype, contiguous, or None.
        ids: int32 [T, K] contiguous, to be written.
        weights: float32 [T, K] contiguous, to be written.
    """

    logits: torch.Tensor
    bias: torch.Tensor | None
    ids: torch.Tensor
    weights: torch.Tensor
