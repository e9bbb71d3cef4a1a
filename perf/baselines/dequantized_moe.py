# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportCallIssue=false
"""FP4 x FP4 layers by a bf16 layer: the plain way on cards without FP4 instructions.

Written here, in torch and Triton. vLLM 0.33.0 decodes within its product in place of before it
(vllm_nvfp4_emulation.py). Every call

    rounds x to the values of its FP4 codes
    sorts the slots by expert and gathers their rows
    decodes w13 of every expert that has rows into bf16, and multiplies: torch._grouped_mm
    applies the gated unit and rounds to the values of FP4 codes
    decodes w2, multiplies, and adds up the slots of every token in float32

Experts without rows are not decoded (the card knows them, so a CUDA graph may be captured), and the
gated unit and the rounding are one kernel. What it cannot avoid is 2 bytes a weight of the drawn
experts, written and read again, where FP4 is read once.

The grouped product rounds to bf16 before the multiplier of an expert can be applied, torch's own
path after it, so other codes flip than those that the gate allows for. Of nvfp4 layers with 10 and
40 slots it failed the gate in 3 of 14 draws, where 8 tokens of 32 and 80 slots are checked in 1 of
37 (CPU, 2026-11-30); mxfp4 has no multipliers. Up to FEW_SLOTS slots therefore have a decoded
weight each, and torch.bmm with float32 results.

All but the products is Triton, and runs in its interpreter. Rejected: torch.bmm for many slots,
which needs as many rows for every expert as the fullest has. Numbers are finite, and products of
codes and scales normal in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton import knobs
from workloads import MoEWorkload

import cutemoe
from cutemoe.commands.oracle import Layer
from cutemoe.formats import QuantizedTensor

GROUP = {"nvfp4": 16, "mxfp4": 32}
# with a copy of their expert's weight each
FEW_SLOTS = 64
# torch's grouped product reads offsets on the host elsewhere, which no CUDA graph can hold
GROUPED_MM = (9, 10)
_BYTES = 1024
_COLUMNS = 1024


@dataclass(frozen=True, eq=False)
class Prepared:
    """A layer as stored: nothing is computed ahead."""

    w: MoEWorkload
    w13: QuantizedTensor
    w2: QuantizedTensor


def unavailable() -> str | None:
    """Why it does not run here."""
    if torch.cuda.is_available():
        major = torch.cuda.get_device_capability()[0]
        return None if major in GROUPED_MM else f"needs sm_90 or sm_100, got sm_{major}x"
    return None if knobs.runtime.interpret else "needs a CUDA device, or TRITON_INTERPRET=1"


def refuse(w: MoEWorkload) -> str | None:
    """Why a workload is not run."""
    if w.weights != w.activations or w.weights not in GROUP:
        got = f"{w.weights} and {w.activations}"
        return f"weights and activations both nvfp4 or both mxfp4, got {got}"
    return "layers without biases only" if w.biases else None


def prepare_layer(w: MoEWorkload, layer: Layer) -> Prepared:
    """The layer's own tensors."""
    if not isinstance(layer.w13, QuantizedTensor) or not isinstance(layer.w2, QuantizedTensor):
        raise TypeError("dense weights")
    return Prepared(w, layer.w13, layer.w2)


def run_layer(p: Prepared, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Routing and layer, x [T, H] bf16 and logits [T, E] float32 -> [T, H] bf16."""
    w = p.w
    ids, weights = cutemoe.route(logits, w.top_k, **dict(w.routing))
    experts, order = ids.flatten().sort(stable=True)
    rows = rounded(x, w.activations)[order.div(w.top_k, rounding_mode="floor")]
    h = product(rows, p.w13, experts)
    mid = gated(h, p.w13.global_scale, experts, w)
    y = product(mid, p.w2, experts)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    return combined(y, p.w2.global_scale, place, ids, weights, w.experts)


def product(x: torch.Tensor, q: QuantizedTensor, experts: torch.Tensor) -> torch.Tensor:
    """x [R, Kdim] bf16 times codes and block scales of q [E, N, Kdim], by sorted experts [R].

    Returns [R, N] in float32, of more than FEW_SLOTS rows in bf16.
    """
    if len(x) <= FEW_SLOTS:
        weights = decoded(q, experts)
        if x.is_cuda:
            return torch.bmm(x[:, None], weights.mT, out_dtype=torch.float32)[:, 0]
        return (weights.float() @ x.float()[:, :, None])[..., 0]
    every = torch.arange(q.shape[0], dtype=experts.dtype, device=x.device)
    ends = torch.searchsorted(experts, every, right=True, out_int32=True)
    return grouped(x, decoded_where(q, ends), ends)


def grouped(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Sorted rows x [R, Kdim] times the transposed weights [E, N, Kdim] of their experts, bf16."""
    if x.is_cuda:
        return torch._grouped_mm(x, weights.mT, offs=ends)
    out, start = torch.empty(x.shape[0], weights.shape[1], dtype=x.dtype), 0
    for e, end in enumerate(ends.tolist()):
        if end > start:
            out[start:end] = (x[start:end].float() @ weights[e].float().T).to(x.dtype)
        start = end
    return out


def decoded(q: QuantizedTensor, experts: torch.Tensor) -> torch.Tensor:
    """Codes times block scales of some experts [R] in bf16, exactly: [R, N, Kdim]."""
    out = torch.empty(len(experts), *q.shape[1:], dtype=torch.bfloat16, device=q.device)
    return _decoded(q, out, experts, None)


def decoded_where(q: QuantizedTensor, ends: torch.Tensor) -> torch.Tensor:
    """The same of all experts [E, N, Kdim]; of those without rows nothing is written.

    ends: int32 [E], where their sorted rows end.
    """
    out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    return _decoded(q, out, None, ends)


def _decoded(
    q: QuantizedTensor,
    out: torch.Tensor,
    experts: torch.Tensor | None,
    ends: torch.Tensor | None,
) -> torch.Tensor:
    size, scale = q.data[0].numel(), q.scale.view(torch.uint8)
    e8m0, half = q.format == "mxfp4", GROUP[q.format] // 2
    grid = (triton.cdiv(size, _BYTES), out.shape[0])
    _decode[grid](
        q.data, scale, out, experts, ends, size, half, e8m0, _BYTES, enable_fp_fusion=True
    )  # fmt: skip
    return out


def rounded(x: torch.Tensor, format: str) -> torch.Tensor:
    """x [rows, W] -> bf16 values of its codes in a format with multiplier 1."""
    x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    grid = (x.shape[0], triton.cdiv(x.shape[1], _COLUMNS))
    _round[grid](x, out, x.shape[1], GROUP[format], _COLUMNS, enable_fp_fusion=False)
    return out


def gated(
    h: torch.Tensor, factor: torch.Tensor | None, experts: torch.Tensor, w: MoEWorkload
) -> torch.Tensor:
    """The gated unit of h [R, 2I] times the experts' multipliers -> bf16 values of codes [R, I]."""
    width = h.shape[1] // 2
    out = torch.empty(h.shape[0], width, dtype=torch.bfloat16, device=h.device)
    alpha, beta, limit = w.swiglu
    # of an output j gate and up are first + j * step
    gate, up, step = {
        "gate_up": (0, width, 1),
        "up_gate": (width, 0, 1),
        "interleaved": (0, 1, 2),
    }[w.gate_up]
    grid = (h.shape[0], triton.cdiv(width, _COLUMNS))
    _unit[grid](
        h, _of_experts(factor, w.experts), experts, out, width, gate, up, alpha, beta,
        0.0 if limit is None else limit, limit is not None, step, GROUP[w.activations], _COLUMNS,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out


def combined(
    y: torch.Tensor,
    factor: torch.Tensor | None,
    place: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: int,
) -> torch.Tensor:
    """Sums over the slots of a token, of sorted rows y [R, H] at place [R], -> [T, H] bf16."""
    (tokens, top_k), hidden = ids.shape, y.shape[1]
    out = torch.empty(tokens, hidden, dtype=torch.bfloat16, device=y.device)
    grid = (tokens, triton.cdiv(hidden, _COLUMNS))
    _combine[grid](
        y, _of_experts(factor, experts), place, ids, weights, out, hidden, top_k, _COLUMNS,
        enable_fp_fusion=True,
    )  # fmt: skip
    return out


def _of_experts(factor: torch.Tensor | None, experts: int) -> torch.Tensor | None:
    return None if factor is None else factor.expand(experts).contiguous()


@triton.jit
def _decode(
    code_ptr,  # uint8 [E, SIZE], two codes a byte
    scale_ptr,  # uint8 [E, SIZE / HALF]
    out_ptr,  # bf16 [.., 2 SIZE]
    expert_ptr,  # [..] or None: expert i, if ends say that it has rows
    ends_ptr,
    SIZE,
    HALF: tl.constexpr,  # bytes that share a scale
    E8M0: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some bytes of an expert."""
    i = tl.program_id(1).to(tl.int64)
    if expert_ptr is not None:
        e = tl.load(expert_ptr + i).to(tl.int64)
        rows = 1
    else:
        e = i
        rows = tl.load(ends_ptr + e) - tl.load(ends_ptr + e - 1, mask=e > 0, other=0)
    if rows > 0:
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        live = at < SIZE
        byte = tl.load(code_ptr + e * SIZE + at, mask=live, other=0).to(tl.int32)
        scale = tl.load(scale_ptr + e * (SIZE // HALF) + at // HALF, mask=live, other=0)
        s = _scale(scale.to(tl.int32), E8M0)
        pair = tl.interleave(_value(byte & 15) * s, _value(byte >> 4) * s)
        to = tl.program_id(0) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
        tl.store(out_ptr + i * (2 * SIZE) + to, pair.to(tl.bfloat16), mask=to < 2 * SIZE)


@triton.jit
def _value(code):
    """e2m1 codes 0..15 -> float32."""
    field, m = (code >> 1) & 3, code & 1
    halves = tl.where(field == 0, m, (2 + m) << tl.maximum(field - 1, 0))
    return tl.where(code >= 8, -0.5, 0.5) * halves.to(tl.float32)


@triton.jit
def _scale(byte, E8M0: tl.constexpr):
    """Bytes of positive finite scales -> float32."""
    if E8M0:
        # 2^-127 is no normal number
        return tl.where(byte == 0, 1 << 22, byte << 23).to(tl.float32, bitcast=True)
    field, m = byte >> 3, byte & 7
    power = (tl.maximum(field, 1) + 117) << 23
    return tl.where(field == 0, m, 8 + m).to(tl.float32) * power.to(tl.float32, bitcast=True)


@triton.jit
def _nearest(x, unit):
    """Multiples of the power of two `unit` nearest to x >= 0, ties to even; x / unit < 2^22."""
    # 1.5 * 2^23: a float32 there has steps of 1
    return (x + 12582912.0 * unit) - 12582912.0 * unit


@triton.jit
def _rounded(x, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """float32 [BLOCK] -> the values of its codes in blocks of GROUP: nvfp4 (16) or mxfp4 (32).

    The operations and their order are those of cutemoe.formats.
    """
    blocks = tl.reshape(x, (BLOCK // GROUP, GROUP))
    amax = tl.max(tl.abs(blocks), axis=1)
    if GROUP == 16:
        s = tl.minimum(amax * 0.16666666666666666, 448.0)
        field = (s.to(tl.int32, bitcast=True) >> 23) & 255
        # three bits of mantissa, and no unit below 2^-9
        unit = (tl.maximum(field - 3, 118) << 23).to(tl.float32, bitcast=True)
        s = _nearest(s, unit)
        r = tl.where(s > 0.0, tl.div_rn(1.0, tl.where(s > 0.0, s, 1.0)), 0.0)
    else:
        byte = tl.maximum((amax.to(tl.int32, bitcast=True) >> 23) - 2, 0)
        s = _scale(byte, True)
        r = ((254 - byte) << 23).to(tl.float32, bitcast=True)
    y = blocks * r[:, None]
    a = tl.minimum(tl.abs(y), 6.0)
    q = _nearest(a, tl.where(a < 2.0, 0.5, tl.where(a < 4.0, 1.0, 2.0)))
    return tl.reshape(tl.where(y < 0.0, -q, q) * s[:, None], (BLOCK,))


@triton.jit
def _round(x_ptr, out_ptr, WIDTH, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Columns of a row, float in memory -> bf16."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    y = _rounded(x, GROUP, BLOCK)
    tl.store(out_ptr + row * WIDTH + at, y.to(tl.bfloat16), mask=at < WIDTH)


@triton.jit
def _unit(
    h_ptr,  # bf16 or float32 [R, 2 WIDTH]
    factor_ptr,  # float32 [E] or None
    expert_ptr,  # [R]
    out_ptr,  # bf16 [R, WIDTH]
    WIDTH,
    GATE,
    UP,
    alpha,
    beta,
    limit,
    LIMIT: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Columns of a row: the gated unit in float32, rounded to the values of its codes."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = at < WIDTH
    from_ptr = h_ptr + row * (2 * WIDTH) + at * STEP
    gate = tl.load(from_ptr + GATE, mask=live, other=0.0).to(tl.float32)
    up = tl.load(from_ptr + UP, mask=live, other=0.0).to(tl.float32)
    if factor_ptr is not None:
        m = tl.load(factor_ptr + tl.load(expert_ptr + row))
        gate, up = gate * m, up * m
    if LIMIT:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    y = gate * tl.sigmoid(alpha * gate) * (up + beta)
    y = _rounded(tl.where(live, y, 0.0), GROUP, BLOCK)
    tl.store(out_ptr + row * WIDTH + at, y.to(tl.bfloat16), mask=live)


@triton.jit
def _combine(
    y_ptr,  # bf16 or float32 [R, WIDTH]
    factor_ptr,  # float32 [E] or None
    place_ptr,  # [R], sorted row of a slot
    id_ptr,  # [R]
    weight_ptr,  # float32 [R]
    out_ptr,  # bf16 [T, WIDTH]
    WIDTH,
    TOP_K,
    BLOCK: tl.constexpr,
):
    """Columns of a token: its slots in ascending order, in float32."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for k in range(TOP_K):
        slot = token * TOP_K + k
        m = tl.load(weight_ptr + slot)
        if factor_ptr is not None:
            m = m * tl.load(factor_ptr + tl.load(id_ptr + slot))
        row = tl.load(place_ptr + slot)
        acc += m * tl.load(y_ptr + row * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * WIDTH + at, acc.to(tl.bfloat16), mask=at < WIDTH)
