"""Oracles for the calls of the package, independent of its back ends, and the tolerance rule.

Plain torch in any precision, for `cutemoe demo`, for perf/ and for anyone who checks kernels: the
functions here share with the package only how a quantized tensor is decoded. The bound is derived,
never chosen: twice the error of the same sum done by torch in the dtypes of the call, plus one unit
in the last place of the output dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from cutemoe.formats import QuantizedTensor, quantize

Weight = QuantizedTensor | torch.Tensor

_ROWS = 256


@dataclass(frozen=True)
class Verdict:
    """Worst error of a call against float64 and its bound, both in units of the exact rms."""

    error: float
    bound: float

    @property
    def ok(self) -> bool:
        """True where the error is a number within the bound."""
        return math.isfinite(self.error) and self.error <= self.bound


def judge(out: torch.Tensor, exact: torch.Tensor, path: torch.Tensor) -> Verdict:
    """Compares a result with float64, given what torch computes in the dtypes of the call.

    The worst element is the one furthest over its own unit in the last place; the root mean square
    obeys the same rule. Whichever is nearer to its bound is the answer.
    """
    e = exact.double()
    rms = float(e.square().mean().sqrt()) or 1.0
    info = torch.finfo(out.dtype)
    exponent = torch.frexp(e.abs().clamp(min=info.smallest_normal)).exponent
    ulp = torch.ldexp(torch.full_like(e, info.eps), exponent - 1)
    mine, theirs = (out.double() - e).abs(), (path.double() - e).abs()
    if not bool(torch.isfinite(mine).all()):
        return Verdict(math.nan, 0.0)
    at = (mine - ulp).argmax()
    peak = Verdict(
        float(mine.flatten()[at]) / rms,
        (2.0 * float(theirs.max()) + float(ulp.flatten()[at])) / rms,
    )
    mean = Verdict(_rms(mine) / rms, (2.0 * _rms(theirs) + _rms(ulp)) / rms)
    return worst((peak, mean))


def _rms(t: torch.Tensor) -> float:
    return float(t.square().mean().sqrt())


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict nearest to, or furthest beyond, its bound."""
    return max(verdicts, key=lambda v: math.inf if math.isnan(v.error) else v.error / v.bound)


@dataclass(frozen=True, eq=False)
class Layer:
    """A mixture-of-experts layer as stored: weights, biases and what its GEMMs multiply with."""

    w13: Weight
    w2: Weight
    b13: torch.Tensor | None = None
    b2: torch.Tensor | None = None
    gate_up: str = "gate_up"
    activations: str = "bf16"
    swiglu: tuple[float, float, float | None] = (1.0, 0.0, None)


def decoded(w: Weight, e: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One expert's weight [N, Kdim] in float32, exactly, and the multiplier it still needs."""
    if isinstance(w, torch.Tensor):
        return w[e].float(), None
    g = w.global_scale
    if g is not None and g.ndim:
        g = g[e]
    part = QuantizedTensor(w.data[e], w.scale[e], format=w.format, group_size=w.group_size)
    return part.dequantize(), g


def moe(
    x: torch.Tensor, layer: Layer, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer on x [T, H] with ids and weights [T, K]: float64 [T, H], and torch's own path.

    float64 is the meaning: activations are quantized where the layer says so, and nothing else is
    rounded. The path works in float32 and rounds what the layer rounds: its result and the
    activation. Where the latter becomes a code, the first product is rounded to the dtype of x too,
    as eager torch stores it: codes at a tie flip in any other order of summation, and a path in
    which none does would bound nothing.
    """
    exact = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    path = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for e in ids.unique().tolist():
        rows, slots = torch.where(ids == e)
        w13, w2 = decoded(layer.w13, e), decoded(layer.w2, e)
        for out in (exact, path):
            y = _expert(x[rows], layer, e, w13, w2, out.dtype)
            out.index_add_(0, rows, y * weights[rows, slots, None].to(out.dtype))
    return exact, path.to(x.dtype)


def _expert(
    x: torch.Tensor,
    layer: Layer,
    e: int,
    w13: tuple[torch.Tensor, torch.Tensor | None],
    w2: tuple[torch.Tensor, torch.Tensor | None],
    dtype: torch.dtype,
) -> torch.Tensor:
    """What one expert gives for rows x, in float64 or, rounded as torch would, in float32."""

    def stored(t: torch.Tensor) -> torch.Tensor:
        return t if dtype == torch.float64 else t.to(x.dtype).to(dtype)

    quantized = layer.activations in ("fp8", "nvfp4", "mxfp4")

    def operand(t: torch.Tensor) -> torch.Tensor:
        if not quantized:
            return stored(t)
        one = 1.0 if layer.activations == "nvfp4" else None
        return quantize(t.float(), layer.activations, global_scale=one).dequantize(dtype)

    def linear(
        t: torch.Tensor,
        weight: tuple[torch.Tensor, torch.Tensor | None],
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        values, factor = weight
        t = operand(t)
        # converted in parts that stay in a CPU's cache
        y = torch.cat([t @ part.to(dtype).T for part in values.split(_ROWS)], -1)
        y = y if factor is None else y * factor.to(dtype)
        return y if bias is None else y + bias[e].to(dtype)

    h = linear(x.to(dtype), w13, layer.b13)
    gate, up = halves(stored(h) if quantized else h, layer.gate_up)
    return linear(swiglu(gate, up, *layer.swiglu), w2, layer.b2)


def halves(h: torch.Tensor, gate_up: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up columns of the first product."""
    if gate_up == "interleaved":
        return h[:, 0::2], h[:, 1::2]
    first, second = h.chunk(2, dim=-1)
    return (first, second) if gate_up == "gate_up" else (second, first)


def swiglu(
    gate: torch.Tensor, up: torch.Tensor, alpha: float, beta: float, limit: float | None
) -> torch.Tensor:
    """gate' * sigmoid(alpha * gate') * (up' + beta), clamped where there is a limit."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


@dataclass(frozen=True, eq=False)
class Steps:
    """Inputs of gated delta net steps: q, k [n, T, HQ, D], v [n, T, HV, D], a, b [n, T, HV]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor

    def of(self, rows: torch.Tensor) -> Steps:
        """The same of some sequences."""
        part = {name: getattr(self, name)[rows] for name in ("q", "k", "v", "a", "b")}
        return replace(self, **part)


def gdn(steps: Steps, state: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Token loop from state [n, HV, D, D] (K last) -> outputs [n, T, HV, D], states [n, T, ...].

    float64 is the meaning. float32 is the same-precision path: outputs rounded to v's dtype,
    states to the pool's.
    """
    exact = dtype == torch.float64
    share = steps.v.shape[2] // steps.q.shape[2]
    q, k = (_normalised(t.to(dtype)).repeat_interleave(share, 2) for t in (steps.q, steps.k))
    v = steps.v.to(dtype)
    softplus = torch.nn.functional.softplus(steps.a.to(dtype) + steps.dt_bias.to(dtype))
    decay = torch.exp(-torch.exp(steps.A_log.to(dtype)) * softplus)
    beta = torch.sigmoid(steps.b.to(dtype))
    s = state.to(dtype)
    outputs, states = [], []
    for t in range(v.shape[1]):
        s = s * decay[:, t, :, None, None]
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("nhvk,nhk->nhv", s, k[:, t]))
        s = s + u[..., None] * k[:, t, :, None, :]
        outputs.append(torch.einsum("nhvk,nhk->nhv", s, q[:, t]) * v.shape[-1] ** -0.5)
        states.append(s)
    o, after = torch.stack(outputs, 1), torch.stack(states, 1)
    return (o, after) if exact else (o.to(steps.v.dtype), after.to(state.dtype))


def _normalised(t: torch.Tensor) -> torch.Tensor:
    return t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6)
