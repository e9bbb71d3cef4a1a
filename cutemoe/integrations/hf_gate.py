"""What an expert layer of transformers computes between its two products.

Decision: a layer is recognised by running its own `_apply_gate` on numbers and comparing; the
module's attributes only propose candidates. Rejected: a table of model classes (a new model, or an
edited one, would be computed wrongly in silence), and trusting `is_concatenated` (models with a
gate of their own do not set it).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

from cutemoe import GeGLU, ReLU2, SwiGLU, Unsupported

Activation = SwiGLU | GeGLU | ReLU2
_ALPHAS = ("alpha", "swiglu_alpha")
_LIMITS = ("limit", "swiglu_limit")
# gelu(x) = x * sigmoid(1.702 x) is "quick_gelu" in transformers
_QUICK_GELU = 1.702


def recognise(name: str, module: Any) -> tuple[Activation, str]:
    """The activation of a layer and the order of its first rows, as `prepare_moe` names them.

    Args:
        name: what errors call the layer.
        module: of a class decorated with transformers' `use_experts_implementation`.

    Raises:
        Unsupported: none of cutemoe's activations gives what the layer's own gate gives, or the
            layer has a norm behind its second product.
    """
    if getattr(module, "has_post_expert_norm", False):
        kind = type(module).__name__
        raise Unsupported(f"{name}: {kind} has a norm behind its experts, which cutemoe lacks")
    gate, up = _grid(2.0 * max((v for v in _numbers(module, _LIMITS) if v < 1e3), default=8.0))
    if not module.has_gate:
        if _same(module.act_fn, gate, F.relu(gate).square()):
            return ReLU2(), "gate_up"
    else:
        rows = {
            "gate_up": torch.cat((gate, up)),
            "interleaved": torch.stack((gate, up), dim=-1).flatten(),
            "up_gate": torch.cat((up, gate)),
        }
        for activation in _candidates(module):
            want = _value(activation, gate, up)
            for order, x in rows.items():
                if _same(module._apply_gate, x, want):
                    return activation, order
    act = getattr(getattr(module, "config", None), "hidden_act", None)
    raise Unsupported(
        f"{name}: the gate of {type(module).__name__} (config.hidden_act {act!r}) is none that "
        "cutemoe computes: SwiGLU with alpha, beta and limit, GeGLU, or ReLU2 without a gate"
    )


def _grid(width: float) -> tuple[torch.Tensor, torch.Tensor]:
    points = torch.linspace(-width, width, 97, dtype=torch.float64)
    gate, up = torch.meshgrid(points, points, indexing="ij")
    return gate.reshape(-1), up.reshape(-1)


def _candidates(module: Any) -> Iterator[SwiGLU | GeGLU]:
    for alpha in (*_numbers(module, _ALPHAS), 1.0, _QUICK_GELU):
        for limit in (*_numbers(module, _LIMITS), None):
            for beta in (1.0, 0.0):
                yield SwiGLU(alpha=alpha, beta=beta, limit=limit)
    yield GeGLU()
    yield GeGLU(approximate="tanh")


def _numbers(module: Any, names: tuple[str, ...]) -> list[float]:
    values = (getattr(module, name, None) for name in names)
    return [float(v) for v in values if isinstance(v, (int, float)) and 0 < v < math.inf]


def _value(activation: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if isinstance(activation, GeGLU):
        return F.gelu(gate, approximate=activation.approximate) * up
    if activation.limit is not None:
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit)
    return gate * torch.sigmoid(activation.alpha * gate) * (up + activation.beta)


def _same(function: Any, x: torch.Tensor, want: torch.Tensor) -> bool:
    try:
        got = function(x)
    except (RuntimeError, TypeError, AttributeError):
        return False
    return got.shape == want.shape and torch.allclose(got, want, rtol=1e-9, atol=1e-12)
