"""The meaning of a MoE layer in torch; also the back end that runs anywhere."""

from __future__ import annotations

import torch
from torch.nn import functional

from cutemoe.formats import FORMATS, e2m1, fp8, nvfp4
from cutemoe.formats.format import grouped
from cutemoe.gemm.reference import multiply
from cutemoe.gemm.weight import PackedWeight
from cutemoe.moe.problem import Problem
from cutemoe.moe.tensors import MoETensors

ROUNDED = {"bf16": torch.bfloat16, "fp16": torch.float16}


def run(problem: Problem, config: None, t: MoETensors) -> None:
    """The torch back end. Reads which experts are active on the host, so it waits for a GPU."""
    t.out.copy_(fused_moe_reference(problem, t))


def fused_moe_reference(
    problem: Problem, t: MoETensors, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The layer's output [T, H] before its rounding to the dtype of x.

    Quantisation of activations is that of the problem, bit for bit. `dtype`, float32 or float64,
    is that of all other products, sums and functions; with rounding "eager" of the sums only.
    """
    slots = problem.tokens * problem.top_k
    local = _local_experts(problem, t.ids)
    order = local.flatten().argsort(stable=True)
    counts = local.flatten().bincount(minlength=problem.experts + 1).tolist()
    y = torch.zeros(slots, problem.hidden, dtype=dtype, device=t.x.device)
    start = 0
    for expert, count in enumerate(counts[: problem.experts]):
        if count:
            rows = order[start : start + count]
            tokens = rows.div(problem.top_k, rounding_mode="floor")
            y[rows] = _expert(problem, t, expert, t.x[tokens], dtype).to(dtype)
            start += count
    live, parts = local < problem.experts, 1 if problem.rounding == "fused" else 4
    return _combine(y.view(*local.shape, -1), t.weights, live, parts)


def _local_experts(problem: Problem, ids: torch.Tensor) -> torch.Tensor:
    """Ids [T, K] -> local expert, or E for a slot to skip; no id is subtracted unless in range."""
    wide, first = ids.long(), problem.expert_offset
    here = (wide >= first) & (wide < first + problem.experts)
    return torch.where(here, torch.where(here, wide, first) - first, problem.experts)


def _expert(
    problem: Problem, t: MoETensors, expert: int, x: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """What one expert gives for its rows x [rows, H], with bias, without routing weight."""
    h = _linear(problem, t.w13, expert, x, t.input_scale1, t.b13, dtype)
    a = _activate(problem, t, expert, h)
    return _linear(problem, t.w2, expert, a, t.input_scale2, t.b2, dtype)


def _linear(
    problem: Problem,
    w: PackedWeight,
    expert: int,
    x: torch.Tensor,
    static_scale: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    scale = None if static_scale is None else static_scale[expert]
    values, multiplier = quantised_rows(x, problem.activations, scale)
    y = multiply(values.to(dtype), w, expert)
    if multiplier is not None:
        y *= multiplier
    if problem.rounding == "eager":
        y = y.to(x.dtype)
    if bias is not None:
        y += bias[expert].to(y.dtype)
    return y


def quantised_rows(
    x: torch.Tensor, activations: str, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows [rows, Kdim] as a GEMM reads them: values, and the multiplier of its sums.

    bf16 and fp16 round once. fp8: e4m3 of x / s with s = amax / 448 of the row, or the static
    `scale` []. nvfp4: blocks of 16 under the global multiplier `scale` []. mxfp4: blocks of 32. Of
    both the values include the block scales, exactly.
    """
    if activations in ROUNDED:
        return x.to(ROUNDED[activations]), None
    x = x.to(torch.float32)
    if activations == "fp8":
        s = fp8.row_scale(x) if scale is None else scale
        return fp8.encode_with(x, s).to(torch.float32), s.reshape(-1, 1)
    if activations == "mxfp4":
        form = FORMATS["mxfp4"]
        data, exponent = form.encode(x, 32, None)
        values = grouped(form.decode(data), 32) * form.decode_scale(exponent)[..., None]
        return values.flatten(-2), None
    if scale is None:
        scale = x.new_ones(())
    code, block_scale = nvfp4.encode_blocks(grouped(x, 16), 1.0 / scale)
    values = e2m1.decode(code) * block_scale.to(torch.float32)[..., None]
    return values.flatten(-2), scale


def _activate(problem: Problem, t: MoETensors, expert: int, h: torch.Tensor) -> torch.Tensor:
    """FC1 sums [rows, 2I] or [rows, I] -> [rows, I]."""
    if problem.activation == "relu2":
        return torch.relu(h).square()
    if problem.gate_up == "interleaved":
        gate, up = h[:, 0::2], h[:, 1::2]
    else:
        gate, up = h.chunk(2, dim=1)
        if problem.gate_up == "up_gate":
            gate, up = up, gate
    if problem.activation != "swiglu":
        tanh = problem.activation == "geglu_tanh"
        return functional.gelu(gate, approximate="tanh" if tanh else "none") * up
    if t.limit is not None:
        limit = _of_expert(t.limit, expert, h)
        gate, up = torch.clamp(gate, max=limit), torch.clamp(up, -limit, limit)
    if problem.rounding == "eager":
        return _swiglu_eager(t, expert, gate, up)
    gate = gate * torch.sigmoid(_of_expert(t.alpha, expert, h) * gate)
    return gate * (up + _of_expert(t.beta, expert, h))


def _swiglu_eager(t: MoETensors, expert: int, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Clamped gate and up in the dtype of x, as every operation's result."""
    wide = gate.to(torch.float32)
    if isinstance(t.alpha, torch.Tensor) or t.alpha != 1.0:
        gate = gate * torch.sigmoid((_of_expert(t.alpha, expert, wide) * wide).to(gate.dtype))
    else:
        gate = functional.silu(gate)
    return gate * (up.to(wide.dtype) + _of_expert(t.beta, expert, wide)).to(gate.dtype)


def _of_expert(p: float | torch.Tensor, expert: int, like: torch.Tensor) -> torch.Tensor:
    """A parameter of the activation as a scalar tensor."""
    value = p[expert] if isinstance(p, torch.Tensor) else p
    return torch.as_tensor(value, dtype=like.dtype, device=like.device)


def _combine(
    y: torch.Tensor, weights: torch.Tensor, live: torch.Tensor, parts: int
) -> torch.Tensor:
    """Sum over slots of weight * y [T, K, H]; the weight of a skipped slot is not used.

    Products have the dtype of y, and are rounded to that of weights where it has 16 bits. Slots i,
    i + parts, .. are added up first.
    """
    out = torch.zeros_like(y[:, 0])
    for i in range(parts):
        part = torch.zeros_like(out)
        for k in range(i, y.shape[1], parts):
            product = weights[:, k, None].to(y.dtype) * y[:, k]
            if weights.dtype != torch.float32:
                product = product.to(weights.dtype).to(y.dtype)
            part += torch.where(live[:, k, None], product, 0.0)
        out += part
    return out
