"""The adapter of vLLM's emulated NVFP4 layers, with torch in the place of what it calls there."""

from __future__ import annotations

import dataclasses
import sys
import types
from enum import Enum
from typing import Any

import moe_case
import pytest
import torch
from baselines import vllm_nvfp4_emulation as peer
from workloads import WORKLOADS, MoEWorkload

import cutemoe

LAYER = MoEWorkload("tiny", 64, 32, 5, 2, weights="nvfp4", activations="nvfp4")
BLOCK = 4


def test_it_says_what_it_does_not_run() -> None:
    layers = {n: w for n, w in WORKLOADS.items() if isinstance(w, MoEWorkload)}
    runs = {n for n, w in layers.items() if peer.refuse(w) is None}
    assert runs == {"headline_w4a4", "qwen3_next_w4a4"}
    assert "both nvfp4, got mxfp4 and bf16" in (peer.refuse(layers["headline"]) or "")
    for change in ({"biases": True}, {"gate_up": "up_gate"}, {"swiglu": (1.0, 0.0, 7.0)}):
        assert peer.refuse(dataclasses.replace(LAYER, **change)) is not None


def decoded(q: cutemoe.QuantizedTensor) -> torch.Tensor:
    return q.dequantize(torch.float64)


def rounded(x: torch.Tensor, scale: torch.Tensor, block: int) -> torch.Tensor:
    """Rows as their codes say, under the multiplier 1."""
    assert block == 16 and scale.tolist() == [1.0]
    q = cutemoe.quantize(x.float(), "nvfp4", global_scale=1.0)
    return q.dequantize().to(x.dtype)


def aligned(
    ids: torch.Tensor, block: int, experts: int, expert_map: None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Slots by expert, each expert's padded to whole blocks, and the expert of every block."""
    flat, slots, owners = ids.flatten().tolist(), [], []
    for e in range(experts):
        mine = [i for i, owner in enumerate(flat) if owner == e]
        blocks = -(-len(mine) // block)
        slots += mine + [len(flat)] * (blocks * block - len(mine))
        owners += [e] * blocks
    return torch.tensor(slots), torch.tensor(owners), torch.tensor([len(slots)])


def product(
    A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, B_scale: torch.Tensor, a_scale: torch.Tensor,
    w_scale: torch.Tensor, weights: torch.Tensor | None, slots: torch.Tensor, experts: torch.Tensor,
    padded: torch.Tensor, weighted: bool, top_k: int, config: dict[str, int], compute_type: str,
) -> None:  # fmt: skip
    """What its kernel writes; in float64."""
    assert compute_type == "bf16" and weighted == (weights is not None) and len(slots) == padded
    w = decoded(cutemoe.QuantizedTensor(B, B_scale, w_scale, format="nvfp4"))
    rows = C.view(-1, C.shape[-1])
    for i, slot in enumerate(slots.tolist()):
        if slot < len(rows):
            y = w[experts[i // config["BLOCK_SIZE_M"]]] @ A[slot // top_k].double()
            factor = 1.0 if weights is None else weights.flatten()[slot].double()
            rows[slot] = (y * factor).to(C.dtype)


class Kind(Enum):
    SILU = "silu"


def gated(kind: Kind, output: torch.Tensor, input: torch.Tensor) -> None:
    assert kind is Kind.SILU
    gate, up = input.double().chunk(2, dim=1)
    output.copy_(gate * gate.sigmoid() * up)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of the package that the adapter asks for."""
    parts: dict[str, Any] = {
        peer._KERNEL: {
            "invoke_fused_moe_nvfp4_emulation_kernel": product,
            "moe_align_block_size": aligned,
            "try_get_optimal_moe_config": lambda *sizes, block_shape: {"BLOCK_SIZE_M": BLOCK},
            "tl": types.SimpleNamespace(bfloat16="bf16", float16="fp16"),
        },
        "fused_moe.activation": {"MoEActivation": Kind, "apply_moe_activation": gated},
        "quantization.utils.nvfp4_emulation_utils": {"ref_nvfp4_quant_dequant": rounded},
    }
    modules = {f"{peer._LAYERS}.{name}": found for name, found in parts.items()}
    modules["vllm._custom_ops"] = {"moe_sum": lambda y, out: out.copy_(y.double().sum(1))}
    for name, found in modules.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**found))  # type: ignore[arg-type]


@pytest.mark.parametrize("tokens", [1, 7, 30])
def test_its_steps_are_those_of_a_layer(tokens: int, engine: None) -> None:
    g = torch.Generator().manual_seed(tokens)
    layer = moe_case.random_layer(LAYER, torch.device("cpu"), g)
    x = torch.randn(tokens, 64, generator=g).bfloat16()
    logits = torch.randn(tokens, 5, generator=g)
    got = peer.run_layer(peer.prepare_layer(LAYER, layer), x, logits)
    ids, weights = cutemoe.route(logits, 2, **dict(LAYER.routing))
    one, w13, w2 = torch.ones(1), decoded(layer.w13), decoded(layer.w2)  # type: ignore[arg-type]
    xq = rounded(x, one, 16).double()
    for t in range(tokens):
        parts = []
        for e, weight in zip(ids[t].tolist(), weights[t].double(), strict=True):
            gate, up = (w13[e] @ xq[t]).bfloat16().double().chunk(2)
            mid = rounded((gate * gate.sigmoid() * up).bfloat16()[None], one, 16)[0].double()
            parts.append((w2[e] @ mid * weight).bfloat16().double())
        assert torch.equal(got[t], torch.stack(parts).sum(0).bfloat16())
