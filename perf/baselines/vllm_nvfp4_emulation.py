"""vLLM 0.33.0 (github.com/vllm-project/vllm): NVFP4 x NVFP4 on cards without FP4 instructions.

Its Triton kernel decodes the weights of a tile into bf16 registers and multiplies with the tensor
core; x and the unit's result are rounded to the values of their FP4 codes before, in bf16. Every
call: rounding, alignment of the slots to tiles, FC1, the unit, rounding, FC2 with routing weights,
the sum of the slots; so do the steps follow each other in its
`Nvfp4QuantizationEmulationTritonExperts.apply`. Routing is ours.

The result of FC1 is rounded to bf16 before the unit, and that of the unit before its codes are
chosen, so codes flip that torch's float32 path does not flip. Small layers fail the gate (a torch
text of the same roundings agrees to 0.002 of their deviation, in float16 in Triton's interpreter,
which has no bf16 products).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from workloads import MoEWorkload

import baselines
import cutemoe
from cutemoe.commands.oracle import Layer
from cutemoe.formats import QuantizedTensor

INSTALL = "pip install vllm==0.33.0"
_LAYERS = "vllm.model_executor.layers"
_KERNEL = "fused_moe.experts.nvfp4_emulation_moe"


@dataclass(frozen=True, eq=False)
class Prepared:
    """A layer as stored, with the multipliers of the weights [E] and of both inputs."""

    w: MoEWorkload
    w13: QuantizedTensor
    w2: QuantizedTensor
    factor13: torch.Tensor
    factor2: torch.Tensor
    one: torch.Tensor


def unavailable() -> str | None:
    """Why it does not run here."""
    part = f"{_LAYERS.removeprefix('vllm.')}.{_KERNEL}".replace(".", "/") + ".py"
    return baselines.missing("vllm", part, INSTALL)


def refuse(w: MoEWorkload) -> str | None:
    """Why a workload is not run."""
    if (w.weights, w.activations) != ("nvfp4", "nvfp4"):
        return f"weights and activations both nvfp4, got {w.weights} and {w.activations}"
    if w.biases or w.gate_up != "gate_up" or w.swiglu != (1.0, 0.0, None):
        return "silu(gate) * up of gates before ups, without biases, only"
    return None


def prepare_layer(w: MoEWorkload, layer: Layer) -> Prepared:
    """The layer's own tensors."""
    pair = (layer.w13, layer.w2)
    if not all(isinstance(q, QuantizedTensor) for q in pair):
        raise TypeError("dense weights")
    one = torch.ones(1, device=layer.w2.device)
    factors = [
        one.expand(w.experts) if (g := getattr(q, "global_scale", None)) is None else g.float()
        for q in pair
    ]
    factor13, factor2 = (f.expand(w.experts).contiguous() for f in factors)
    w13: Any = layer.w13
    w2: Any = layer.w2
    return Prepared(w, w13, w2, factor13, factor2, one)


def run_layer(p: Prepared, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Routing and layer, x [T, H] in 16 bits and logits [T, E] float32 -> [T, H]."""
    theirs = importlib.import_module(f"{_LAYERS}.{_KERNEL}")
    unit = importlib.import_module(f"{_LAYERS}.fused_moe.activation")
    ops = importlib.import_module("vllm._custom_ops")
    w, tokens = p.w, len(x)
    ids, weights = cutemoe.route(logits, w.top_k, **dict(w.routing))
    sizes = (p.w13.data.size(), p.w2.data.size())
    config = theirs.try_get_optimal_moe_config(*sizes, w.top_k, None, tokens, block_shape=None)
    places = theirs.moe_align_block_size(ids, config["BLOCK_SIZE_M"], w.experts, None)
    wide = x.new_empty(tokens, w.top_k, 2 * w.intermediate)
    mid = x.new_empty(tokens * w.top_k, w.intermediate)
    y, out = x.new_empty(tokens, w.top_k, w.hidden), torch.empty_like(x)
    product = theirs.invoke_fused_moe_nvfp4_emulation_kernel
    kind = {torch.bfloat16: theirs.tl.bfloat16, torch.float16: theirs.tl.float16}[x.dtype]
    product(
        _rounded(x, p.one), p.w13.data, wide, p.w13.scale, p.one, p.factor13,
        None, *places, False, w.top_k, config, compute_type=kind,
    )  # fmt: skip
    unit.apply_moe_activation(unit.MoEActivation.SILU, mid, wide.view(len(mid), -1))
    product(
        _rounded(mid, p.one), p.w2.data, y, p.w2.scale, p.one, p.factor2,
        weights, *places, True, 1, config, compute_type=kind,
    )  # fmt: skip
    ops.moe_sum(y, out)
    return out


def _rounded(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Rows as their FP4 codes would say, by its kernel."""
    utils = importlib.import_module(f"{_LAYERS}.quantization.utils.nvfp4_emulation_utils")
    return utils.ref_nvfp4_quant_dequant(x, scale, 16)
