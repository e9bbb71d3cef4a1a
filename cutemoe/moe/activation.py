"""The activation between the two GEMMs of an expert, as frozen values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from cutemoe.errors import invalid

Param = float | torch.Tensor


@dataclass(frozen=True, eq=False)
class SwiGLU:
    """gate' * sigmoid(alpha * gate') * (up' + beta).

    gate' = min(gate, limit) and up' = clamp(up, -limit, limit); limit None does not clamp. SiLU
    gating is `SwiGLU()`, gpt-oss is `SwiGLU(alpha=1.702, beta=1.0, limit=7.0)`.

    Args:
        alpha, beta, limit: a number, or a float32 tensor [E] with a value for each local expert.

    Raises:
        InvalidCall: a number that is NaN or infinite, a limit not above 0, or another type.
    """

    alpha: Param = 1.0
    beta: Param = 0.0
    limit: Param | None = None

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("beta", self.beta), ("limit", self.limit)):
            if isinstance(value, torch.Tensor) or (name == "limit" and value is None):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise invalid(name, "a number or a float32 tensor [E]", type(value).__name__)
            if not math.isfinite(value) or (name == "limit" and value <= 0):
                want = "a finite number above 0" if name == "limit" else "a finite number"
                raise invalid(name, want, value)


@dataclass(frozen=True)
class GeGLU:
    """gelu(gate) * up, with gelu as in torch.

    Args:
        approximate: "none" (erf) or "tanh".

    Raises:
        InvalidCall: another word.
    """

    approximate: str = "none"

    def __post_init__(self) -> None:
        if self.approximate not in ("none", "tanh"):
            raise invalid("approximate", "'none' or 'tanh'", repr(self.approximate))


@dataclass(frozen=True)
class ReLU2:
    """max(x, 0)^2 of an ungated layer, whose w13 is [E, I, H]."""


Activation = SwiGLU | GeGLU | ReLU2


def kind(activation: Activation) -> str:
    """Name of the activation in a problem: "swiglu", "geglu", "geglu_tanh" or "relu2"."""
    if isinstance(activation, SwiGLU):
        return "swiglu"
    if isinstance(activation, GeGLU):
        return "geglu" if activation.approximate == "none" else "geglu_tanh"
    if isinstance(activation, ReLU2):
        return "relu2"
    raise invalid("activation", "SwiGLU(), GeGLU() or ReLU2()", repr(activation))
