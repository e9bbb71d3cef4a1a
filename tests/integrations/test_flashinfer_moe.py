"""Layers in FlashInfer's conventions against dense products in its terms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cutemoe
from cutemoe.integrations.flashinfer_moe import B12xMoEWrapper, b12x_fused_moe
from cutemoe.layouts import LAYOUTS
from tests import strategies as draw
from tests.close import assert_same, assert_within

E, H, I, T, K = 5, 80, 48, 7, 2  # noqa: E741
SWIZZLE = LAYOUTS["sm120_block_scale"]
MMA_VIEW = (3, 4, 1, 5, 2, 0)


def weights(gated: bool = True, scale: float = 1.0) -> dict[str, Any]:
    """Random codes and scales, the same as dense values with up rows before gate rows."""
    n = 2 * I if gated else I
    w1 = cutemoe.quantize(draw.normal((E, n, H), 1, scale=H**-0.5), "nvfp4", global_scale=1.0)
    w2 = cutemoe.quantize(draw.normal((E, H, I), 2, scale=scale), "nvfp4", global_scale=1.0)
    return {"w1": w1, "w2": w2}


def arguments(w: dict[str, Any], device: str = "cpu", view: bool = False) -> dict[str, Any]:
    swizzled = [SWIZZLE.pack(q.scale) for q in (w["w1"], w["w2"])]
    if view:
        swizzled = [s.permute(MMA_VIEW) for s in swizzled]
    named = {
        "w1_weight": w["w1"].data,
        "w1_weight_sf": swizzled[0].view(torch.uint8) if not view else swizzled[0],
        "w2_weight": w["w2"].data,
        "w2_weight_sf": swizzled[1],
        "w1_alpha": 0.004 + 0.001 * torch.arange(E),
        "w2_alpha": 0.02 + 0.001 * torch.arange(E),
        "fc2_input_scale": torch.tensor([0.005]),
    }
    return {name: t.to(device) for name, t in named.items()}


def routing(offset: int = 0, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    r = draw.Routing(T=T, K=K, E=E, offset=offset, pattern="skips", seed=3)
    x = draw.normal((T, H), 4, torch.bfloat16)
    return tuple(t.to(device) for t in (x, r.ids(), r.weights()))


def dense(w, args, x, ids, scales, activation, offset=0, dtype=torch.float64) -> torch.Tensor:
    """The layer in FlashInfer's terms, in dense products; x and the FC2 input are quantised."""
    out = torch.zeros(T, H, dtype=dtype)
    for t in range(T):
        for k in range(K):
            e = int(ids[t, k]) - offset
            if not 0 <= e < E:
                continue
            # codes and block scales of x / alpha
            alpha, d2 = float(args["w1_alpha"][e]), float(args["fc2_input_scale"][0])
            q = cutemoe.quantize(x[t].float(), "nvfp4", global_scale=alpha)
            q = cutemoe.QuantizedTensor(q.data, q.scale, format="nvfp4")
            h = alpha * (w["w1"][e].dequantize(dtype) @ q.dequantize(dtype))
            up, gate = (h[:I], h[I:]) if w["w1"].shape[1] == 2 * I else (None, h)
            m = activation(gate, up)
            q = cutemoe.quantize(m.float(), "nvfp4", global_scale=d2)
            q = cutemoe.QuantizedTensor(q.data, q.scale, format="nvfp4")
            y = float(args["w2_alpha"][e]) * (w["w2"][e].dequantize(dtype) @ q.dequantize(dtype))
            out[t] += float(scales[t, k]) * y
    return out


ACTIVATIONS = {
    "silu": lambda g, u: g * torch.sigmoid(g) * u,
    "gelu_tanh": lambda g, u: torch.nn.functional.gelu(g, approximate="tanh") * u,
    "swigluoai_uninterleave": lambda g, u: (
        g.clamp(max=7.0) * torch.sigmoid(1.702 * g.clamp(max=7.0)) * (u.clamp(-7, 7) + 1)
    ),
    "relu2": lambda g, _: torch.relu(g) ** 2,
}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("view", [False, True], ids=["blocks", "view"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_both_entrances(activation, view, device):
    w = weights(gated=activation != "relu2")
    args = arguments(w, device, view)
    x, ids, scales = routing(device=device)
    kwargs: dict[str, Any] = {"activation": activation, "swiglu_limit": 7.0}
    here = {name: t.cpu() for name, t in args.items()}
    terms = (w, here, x.cpu(), ids.cpu(), scales.cpu(), ACTIVATIONS[activation])
    oracle, peer = dense(*terms), dense(*terms, dtype=torch.float32)
    if device == "cuda":
        kwargs["backend"] = "cute_nvfp4"
    moe_args: Any = {k: v for k, v in args.items() if "alpha" in k or "scale" in k}
    w1, sf1, w2, sf2 = (args[n] for n in list(args)[:4])
    got = b12x_fused_moe(x, w1, sf1, w2, sf2, ids, scales, E, K, **moe_args, **kwargs)
    assert_within(got, peer.to(torch.bfloat16), oracle)
    wrapper = B12xMoEWrapper(E, K, H, I, use_cuda_graph=True, max_num_tokens=9, **kwargs)
    run: Any = {"token_selected_experts": ids, "token_final_scales": scales, **args}
    assert_same(wrapper.run(x, **run), got)
    assert wrapper.run(x, **run).data_ptr() == wrapper.run(x[:3], **{
        **run, "token_selected_experts": ids[:3], "token_final_scales": scales[:3]
    }).data_ptr()  # fmt: skip


def dense16(w, args, x, ids, scales, activation, dtype=torch.float64) -> torch.Tensor:
    """The layer of "w4a16": nothing is quantised but to bf16 between the products."""
    out = torch.zeros(T, H, dtype=dtype)
    for t in range(T):
        for k in range(K):
            e = int(ids[t, k])
            if not 0 <= e < E:
                continue
            alpha, a2 = float(args["w1_alpha"][e]), float(args["w2_alpha"][e])
            h = alpha * (w["w1"][e].dequantize(dtype) @ x[t].to(dtype))
            up, gate = (h[:I], h[I:]) if w["w1"].shape[1] == 2 * I else (None, h)
            m = activation(gate, up).bfloat16().to(dtype)
            out[t] += float(scales[t, k]) * a2 * (w["w2"][e].dequantize(dtype) @ m)
    return out


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "mode", [{"quant_mode": "w4a16"}, {"activation_precision": "bf16"}], ids=["mode", "precision"]
)
def test_sixteen_bit_activations(mode, activation, device):
    w = weights(gated=activation != "relu2")
    args = arguments(w, device)
    # sums of order 1
    args["w1_alpha"] = args["w1_alpha"] * 100
    x, ids, scales = routing(device=device)
    here = {name: t.cpu() for name, t in args.items()}
    terms = (w, here, x.cpu(), ids.cpu(), scales.cpu(), ACTIVATIONS[activation])
    oracle, peer = dense16(*terms), dense16(*terms, dtype=torch.float32)
    run: Any = {"token_selected_experts": ids, "token_final_scales": scales, **args}
    wrapper = B12xMoEWrapper(E, K, H, I, activation=activation, swiglu_limit=7.0, **mode)
    got = wrapper.run(x, **run)
    assert_within(got, peer.to(torch.bfloat16), oracle)
    # the scale of an input that is not quantised does not matter
    for other in (None, torch.tensor([7.0], device=device)):
        assert_same(wrapper.run(x, **{**run, "fc2_input_scale": other}), got)


def test_experts_of_this_rank_only():
    w = weights()
    args = arguments(w)
    x, ids, scales = routing(offset=20)
    want = dense(w, args, x, ids, scales, ACTIVATIONS["silu"], offset=20)
    wrapper = B12xMoEWrapper(64, K, H, I, num_local_experts=E, local_expert_offset=20)
    run = {"token_selected_experts": ids, "token_final_scales": scales, **args}
    got = wrapper.run(x, **run)
    peer = dense(w, args, x, ids, scales, ACTIVATIONS["silu"], offset=20, dtype=torch.float32)
    assert_within(got, peer.bfloat16(), want)
    out = torch.full_like(x, torch.nan)
    assert wrapper.run(x, output=out, **run) is out
    assert_same(out, got)


def test_weights_are_prepared_once_and_again_when_they_change():
    args = arguments(weights())
    x, ids, scales = routing()
    run = {"token_selected_experts": ids, "token_final_scales": scales}
    wrapper = B12xMoEWrapper(E, K, H, I)
    first = wrapper.run(x, **args, **run)
    moe = wrapper._moe
    assert wrapper.run(x, **args, **run) is not first and wrapper._moe is moe
    args["w1_alpha"].mul_(3)
    changed = wrapper.run(x, **args, **run)
    assert wrapper._moe is not moe and not torch.equal(changed, first)
    moe = wrapper._moe
    args["w2_weight_sf"] = args["w2_weight_sf"].clone()
    assert_same(wrapper.run(x, **args, **run), changed)
    assert wrapper._moe is not moe


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"w1_weight": torch.zeros(E, I, H // 2).byte()}, r"w1_weight: expected shape \[5, 96, 40"),
        ({"w2_weight_sf": torch.zeros(E, 80, 3).byte()}, "w2_weight_sf: expected"),
        ({"w2_alpha": torch.ones(3)}, r"w2_alpha: expected floating point, shape \[1\] or \[5\]"),
        ({"fc2_input_scale": None}, "fc2_input_scale: expected a tensor"),
        ({"x": torch.zeros(T, H)}, "x: expected bfloat16"),
        ({"token_selected_experts": torch.zeros(T, 3).int()}, "token_selected_experts: expected"),
    ],
)  # fmt: skip
def test_malformed_arguments(change, match):
    x, ids, scales = routing()
    run = {"x": x, "token_selected_experts": ids, "token_final_scales": scales}
    with pytest.raises(cutemoe.InvalidCall, match=match):
        B12xMoEWrapper(E, K, H, I).run(**{**arguments(weights()), **run, **change})


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"activation": "tanh"}, cutemoe.InvalidCall, "activation: expected one of 'silu'"),
        ({"quant_mode": "fp8"}, cutemoe.InvalidCall, "quant_mode: expected one of"),
        ({"output_dtype": torch.float16}, cutemoe.InvalidCall, "output_dtype: expected"),
        ({"swiglu": 1.0}, cutemoe.InvalidCall, "options: expected any of swiglu_alpha"),
        ({"num_local_experts": 4, "local_expert_offset": 3}, cutemoe.InvalidCall, "num_local_exp"),
        ({"num_local_experts": 0}, cutemoe.InvalidCall, "num_local_experts"),
    ],
)
def test_malformed_configurations(kwargs, error, match):
    with pytest.raises(error, match=match):
        B12xMoEWrapper(E, K, H, I, **kwargs)
