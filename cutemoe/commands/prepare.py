"""The calls of a preset, on tensors of no memory: what `cutemoe compile` has compiled.

Each is a call of the public API with meta tensors. Inside `compile_only` it goes through
validation, choice of the back end, configuration and specialisation of every argument like a call
that runs, so there is no second list of what a launch needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

import cutemoe
from cutemoe.formats import FORMATS
from cutemoe.runtime.preset import PRESETS, Heads, Layer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
MOST = 4096


@dataclass(frozen=True)
class Job:
    """Some calls of a preset, compiled by one process.

    Attributes:
        preset: its name.
        kind: "layer", "gemms" or "heads".
        index: which of the formats, or of the states.
        part: which quarter of the batches, small ones first.
    """

    preset: str
    kind: str
    index: int
    part: int

    def __str__(self) -> str:
        preset = PRESETS[self.preset]
        if self.kind == "heads":
            return f"{self.preset} gated delta net, {_of(preset.heads).states[self.index]} states"
        weights, _, activations = _of(preset.layer).formats[self.index]
        what = "layer" if self.kind == "layer" else "grouped GEMMs"
        return f"{self.preset} {what}, {weights} x {activations}, {_span(self.part)}"

    def run(self) -> None:
        """Makes the calls; inside `compile_only`."""
        preset = PRESETS[self.preset]
        first, last = PARTS[self.part]
        sizes = [n for n in batches() if first <= n <= last]
        if self.kind == "heads":
            state = _of(preset.heads).states[self.index]
            for call in gdn_calls(_of(preset.heads), getattr(torch, state), batches()):
                call()
            return
        layer = _of(preset.layer)
        calls = layer_calls if self.kind == "layer" else gemm_calls
        weights, group, activations = layer.formats[self.index]
        for call in calls(layer, weights, group, activations, sizes):
            call()


def batches(most: int = MOST) -> list[int]:
    """Tokens or sequences of a call: enough to meet every configuration and every specialisation.

    All up to 256; then ever wider steps, with the neighbours of powers of two and odd numbers.
    """
    found = set(range(1, 257)) | set(range(256, 1025, 8)) | set(range(1024, MOST + 1, 64))
    for power in range(8, 13):
        found |= {2**power - 1, 2**power + 1}
    found |= {n + 3 for n in range(256, MOST, 128)}
    return sorted(n for n in found if n <= most)


PARTS = ((1, 32), (33, 256), (257, 1024), (1025, MOST))


def _span(part: int) -> str:
    return f"batch {PARTS[part][0]} to {PARTS[part][1]}"


def jobs(preset: str) -> list[Job]:
    """Everything a preset compiles, in parts for several processes."""
    chosen, found = PRESETS[preset], []
    parts = range(len(PARTS))
    if chosen.layer:
        kinds = ["layer", "gemms"] if chosen.layer.gemms else ["layer"]
        for index, (*_, activations) in enumerate(chosen.layer.formats):
            for kind in kinds:
                # no grouped GEMM takes FP4 activations
                if kind == "layer" or activations not in ("nvfp4", "mxfp4"):
                    found += [Job(preset, kind, index, part) for part in parts]
    if chosen.heads:
        found += [Job(preset, "heads", i, 0) for i in range(len(chosen.heads.states))]
    return found


def layer_calls(
    layer: Layer, weights: str, group: int | None, activations: str, sizes: list[int]
) -> Iterator[Callable[[], Any]]:
    """Routing and layer for every number of tokens, and both dtypes of ids and of logits."""
    moe = _prepared(layer, weights, group, activations)
    dtype = DTYPES.get(activations, torch.bfloat16)
    alpha, beta, limit = layer.swiglu
    swiglu = cutemoe.SwiGLU(alpha=alpha, beta=beta, limit=limit)
    routing: dict[str, Any] = dict(layer.routing)
    biased = (False, True) if routing["method"] in ("sigmoid", "grouped_sigmoid") else (False,)
    for tokens in sizes:
        x = _meta(tokens, layer.hidden, dtype=dtype)
        shape = (tokens, layer.top_k)
        scores = _meta(*shape)
        for kind in (torch.float32, torch.bfloat16):
            logits = _meta(tokens, layer.experts, dtype=kind)
            for bias in biased:
                b = _meta(layer.experts) if bias else None
                yield lambda lo=logits, b=b: cutemoe.route(lo, layer.top_k, bias=b, **routing)
        for kind in (torch.int32, torch.int64):
            ids = _meta(*shape, dtype=kind)
            yield lambda x=x, ids=ids, w=scores: cutemoe.fused_moe(
                x, moe, ids, w, activation=swiglu
            )


def gemm_calls(
    layer: Layer, weights: str, group: int | None, activations: str, sizes: list[int]
) -> Iterator[Callable[[], Any]]:
    """Both products of the layer as grouped GEMMs, for the rows of every number of tokens."""
    dtype = torch.float8_e4m3fn if activations == "fp8" else DTYPES[activations]
    offsets = _meta(layer.experts + 1, dtype=torch.int32)
    for n, k in ((2 * layer.intermediate, layer.hidden), (layer.hidden, layer.intermediate)):
        one = cutemoe.prepare_grouped_gemm(_weights(n, k, weights, group), activations=activations)
        w = replace(one, weight=_grown(one.weight, layer.experts))
        for tokens in sizes:
            rows = tokens * layer.top_k
            x = _meta(rows, k, dtype=dtype)
            scale = _meta(rows) if activations == "fp8" else None
            yield lambda x=x, w=w, s=scale: cutemoe.grouped_gemm(x, w, offsets, x_scale=s)


def gdn_calls(heads: Heads, state: torch.dtype, sizes: list[int]) -> Iterator[Callable[[], Any]]:
    """Decode with its kinds of output, verification and flush; and decode as transformers calls."""
    HQ, HV, D = heads.q_heads, heads.v_heads, heads.head_dim
    for B in sizes:
        pool = _meta(B, HV, D, D, dtype=state)
        index = _meta(B, dtype=torch.int32)
        draft = cutemoe.GDNDraft.allocate(B, max(heads.tokens), HQ, HV, D, device="meta")
        for T in heads.tokens:
            x = _gdn_inputs(B, T, HQ, HV, D)
            x |= {"state": pool, "state_indices": index}
            snaps = _meta(B, T, HV, D, D, dtype=state)
            modes: tuple[dict[str, Any], ...] = (
                {},
                {"intermediate_states": snaps},
                {"intermediate_states": snaps, "update_state": False},
                {"intermediate_indices": _meta(B, T, dtype=torch.int32)},
                {"intermediate_indices": _meta(B, T, dtype=torch.int32), "update_state": False},
            )
            for more in modes:
                yield lambda x=x, more=more: cutemoe.gdn_decode(**x, **more)
            yield lambda x=x, d=draft, n=index: cutemoe.gdn_verify(**x, draft=d, num_accepted=n)
        yield lambda p=pool, d=draft, n=index: d.flush(p, n, state_indices=n)
        if state == torch.float32:
            x = _gdn_inputs(B, 1, HV, HV, D, raw=False)
            yield lambda x=x, p=pool: cutemoe.gdn_decode(**x, state=p, state_layout="kv")


def _gdn_inputs(B: int, T: int, HQ: int, HV: int, D: int, raw: bool = True) -> dict[str, Any]:
    bf16 = torch.bfloat16
    q, k = _meta(B, T, HQ, D, dtype=bf16), _meta(B, T, HQ, D, dtype=bf16)
    x = {"q": q, "k": k, "v": _meta(B, T, HV, D, dtype=bf16)}
    if not raw:
        return x | {"g": _meta(B, T, HV), "beta": _meta(B, T, HV)}
    a, b = _meta(B, T, HV, dtype=bf16), _meta(B, T, HV, dtype=bf16)
    return x | {"a": a, "b": b, "A_log": _meta(HV), "dt_bias": _meta(HV)}


def _prepared(layer: Layer, weights: str, group: int | None, activations: str) -> Any:
    """The layer: one expert is packed as the back end wants it, then stands for all."""
    hidden, inter, experts = layer.hidden, layer.intermediate, layer.experts
    moe = cutemoe.prepare_moe(
        _weights(2 * inter, hidden, weights, group),
        _weights(hidden, inter, weights, group),
        torch.zeros(1, 2 * inter) if layer.biases else None,
        torch.zeros(1, hidden) if layer.biases else None,
        activations=activations,
        gate_up=layer.gate_up,
    )
    small = ("b13", "b2", "input_scale1", "input_scale2")
    grown = {name: _all(getattr(moe, name), experts) for name in small}
    pair = {"w13": _grown(moe.w13, experts), "w2": _grown(moe.w2, experts)}
    return replace(moe, **pair, **grown)


def _weights(n: int, k: int, weights: str, group: int | None) -> cutemoe.QuantizedTensor:
    """Weights [1, n, k] of ones in every scale, with the multiplier that checkpoints have."""
    f = FORMATS[weights]
    size = group or f.group_sizes[0]
    data = torch.full((1, n, k // 2), 0x11, dtype=torch.uint8)
    one = torch.ones((1, n, k // size))
    scale = torch.full((1, n, k // size), 127, dtype=torch.uint8)
    scale = scale if f.scale_dtype == torch.uint8 else one.to(f.scale_dtype)
    whole = torch.ones(1) if weights == "nvfp4" else None
    return cutemoe.QuantizedTensor(data, scale, whole, format=weights, group_size=size)


def _grown(packed: Any, experts: int) -> Any:
    names = ("data", "scale", "factor")
    parts = {name: _all(getattr(packed, name), experts) for name in names}
    return replace(packed, **parts, shape=(experts, *packed.shape[1:]))


def _all(t: torch.Tensor | None, experts: int) -> torch.Tensor | None:
    return None if t is None else _meta(experts, *t.shape[1:], dtype=t.dtype)


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _of(part: Any) -> Any:
    if part is None:
        raise cutemoe.InvalidCall("preset: expected one with this operation, got none")
    return part
