"""OpenAI's triton_kernels (github.com/triton-lang/triton, python/triton_kernels, tag v3.5.1).

MXFP4 weights times bf16 in its own layout for the card, SwiGLU fused behind the first product,
gather in it, weighting and sum of the slots behind the second. As in vLLM: split_k = 1, without
which 1 and 4 tokens take 2.4 times as long (one H200, 2026-11-21). Scales exist in both layouts,
for 4 and 8 warps, and 4 serve up to FEW_TOKENS tokens: the better of the two on that card.

Everything from the logits to the sum is timed. Routing is its own where it compiles: top_k a power
of 2, softmax. Elsewhere our `route` chooses, torch sorts, and its kernels make their schedule of
that: about ten small launches, which weigh on its times at few tokens.

Its unit multiplies by up + 1. Where a workload has another beta and no limit, a bias of beta - 1 on
the rows of up makes up for it; float32 keeps that exact to its last place.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from workloads import MoEWorkload

import baselines
import cutemoe
from cutemoe.commands.oracle import Layer

INSTALL = (
    "pip install "
    "git+https://github.com/triton-lang/triton@v3.5.1#subdirectory=python/triton_kernels, "
    "and run where no other triton_kernels comes first on sys.path"
)
# most tokens for the scale layout of 4 warps
FEW_TOKENS = 256


@dataclass(frozen=True, eq=False)
class Prepared:
    """A layer in the layouts of triton_kernels; configurations by number of warps."""

    w: MoEWorkload
    w13: Any
    w2: Any
    b13: torch.Tensor | None
    b2: torch.Tensor | None
    configs13: dict[int, Any]
    configs2: dict[int, Any]
    activation: Any


def unavailable() -> str | None:
    """Why it does not run here."""
    return baselines.missing("triton_kernels", "matmul_ogs.py", INSTALL)


def refuse(w: MoEWorkload) -> str | None:
    """Why a workload is not run."""
    if (w.weights, w.activations) != ("mxfp4", "bf16"):
        return f"mxfp4 weights times bf16 only, got {w.weights} times {w.activations}"
    _, beta, limit = w.swiglu
    if beta != 1.0 and limit is not None:
        return f"SwiGLU with a limit has beta 1, got {beta}"
    return None


def own_routing(w: MoEWorkload) -> bool:
    """Whether its routing computes what the workload asks for, and compiles."""
    softmax = dict(w.routing) in ({"method": "softmax_topk"}, {"method": "topk_softmax"})
    return softmax and w.top_k & (w.top_k - 1) == 0


def prepare_layer(w: MoEWorkload, layer: Layer) -> Prepared:
    """The layer in its layouts; `layer` may be freed."""
    ogs = importlib.import_module("triton_kernels.matmul_ogs")
    flags = importlib.import_module("triton_kernels.matmul_ogs_details.opt_flags")
    unit = importlib.import_module("triton_kernels.swiglu")
    flags.update_opt_flags_constraints({"split_k": 1})
    alpha, _, limit = layer.swiglu
    specs = ogs.FnSpecs("swiglu", unit.swiglu_fn, ("alpha", "limit"))
    gated = ogs.FusedActivation(specs, (alpha, math.inf if limit is None else limit), 2)
    w13, configs13 = _weight(ogs, layer.w13, layer.gate_up)
    w2, configs2 = _weight(ogs, layer.w2, "interleaved")
    return Prepared(w, w13, w2, bias13(layer), layer.b2, configs13, configs2, gated)


def interleaved(rows: torch.Tensor, gate_up: str) -> torch.Tensor:
    """Rows [E, 2I, ..] of gate and up, or of up and gate, in turns: gate first."""
    if gate_up == "interleaved":
        return rows
    halves = rows.unflatten(1, (2, rows.shape[1] // 2))
    halves = halves if gate_up == "gate_up" else halves.flip(1)
    return halves.transpose(1, 2).flatten(1, 2).contiguous()


def bias13(layer: Layer) -> torch.Tensor | None:
    """Bias [E, 2I] of the interleaved rows, with what its unit's beta of 1 differs by."""
    beta = layer.swiglu[1]
    if layer.b13 is None and beta == 1.0:
        return None
    codes: Any = layer.w13
    bias = torch.zeros(codes.data.shape[:2], device=codes.data.device)
    if layer.b13 is not None:
        bias += interleaved(layer.b13, layer.gate_up)
    bias[:, 1::2] += beta - 1.0
    return bias


def _weight(ogs: Any, weight: Any, gate_up: str) -> tuple[Any, dict[int, Any]]:
    """Codes [E, Kdim, N] in its layout, and a configuration for each layout of the scales."""
    tensor = importlib.import_module("triton_kernels.tensor")
    layouts = importlib.import_module("triton_kernels.tensor_details.layout")
    codes = interleaved(weight.data, gate_up).mT
    scale = interleaved(weight.scale, gate_up).mT
    layout, options = layouts.make_default_matmul_mxfp4_w_layout(mx_axis=1)
    wrapped = tensor.wrap_torch_tensor(codes, dtype=tensor.FP4)
    data = tensor.convert_layout(wrapped, layout, **options)
    configs = {}
    for warps in (4, 8):
        layout, options = layouts.make_default_matmul_mxfp4_w_scale_layout(
            mx_axis=1, num_warps=warps
        )
        stored = tensor.convert_layout(tensor.wrap_torch_tensor(scale), layout, **options)
        configs[warps] = ogs.PrecisionConfig(weight_scale=stored)
    return data, configs


def run_layer(p: Prepared, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Routing and layer, x [T, H] bf16 and logits [T, E] float32 -> [T, H] bf16."""
    ogs = importlib.import_module("triton_kernels.matmul_ogs")
    routing = importlib.import_module("triton_kernels.routing")
    if own_routing(p.w):
        data, gather, scatter = routing.routing(logits, p.w.top_k)
    else:
        data, gather, scatter = _our_routing(routing, p.w, logits)
    warps = 4 if x.shape[0] <= FEW_TOKENS else 8
    mid = ogs.matmul_ogs(
        x,
        p.w13,
        p.b13,
        data,
        gather_indx=gather,
        precision_config=p.configs13[warps],
        fused_activation=p.activation,
    )
    return ogs.matmul_ogs(
        mid,
        p.w2,
        p.b2,
        data,
        scatter_indx=scatter,
        precision_config=p.configs2[warps],
        gammas=data.gate_scal,
    )


def _our_routing(routing: Any, w: MoEWorkload, logits: torch.Tensor) -> tuple[Any, Any, Any]:
    """What its `routing` returns, from our choice and our order of the slots."""
    ids, weights = cutemoe.route(logits, w.top_k, **dict(w.routing))
    total = ids.numel()
    made: dict[str, Any] = {"dtype": torch.int32, "device": logits.device}
    experts, order = ids.flatten().sort(stable=True)
    edges = torch.arange(w.experts + 1, **made)
    counts = torch.searchsorted(experts, edges, out_int32=True).diff()
    slots = order.int()
    place = torch.empty(total, **made).scatter_(0, order, torch.arange(total, **made))
    schedule = routing.compute_expt_data(counts, w.experts, total)
    gate = weights.flatten()[order]
    data = routing.RoutingData(gate, counts, w.experts, w.top_k, schedule)
    return data, routing.GatherIndx(slots, place), routing.ScatterIndx(place, slots)
