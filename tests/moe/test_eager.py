"""rounding="eager": a layer of torch's own operators in the dtype of x, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

import cutemoe
from cutemoe.moe import operator
from tests import strategies as draw
from tests.close import assert_same, assert_within
from tests.moe.cases import (
    DTYPES,
    EXACT,
    Layer,
    Target,
    call,
    exact_layer,
    exact_x,
    is_gated,
    naive,
    random_layer,
    values,
)

T, K, E = 9, 3, 5
PER_EXPERT = cutemoe.SwiGLU(
    torch.tensor([1.0, 1.702, 0.5, 1.0, 2.0]), torch.linspace(0, 1, E), torch.linspace(0.3, 3, E)
)
ACTIVATIONS = {
    "silu": cutemoe.SwiGLU(),
    "clamped": cutemoe.SwiGLU(limit=0.7),
    # a beta that bf16 has: torch rounds others first on a CPU, and does not on a GPU
    "shifted": cutemoe.SwiGLU(beta=0.25),
    "quick_gelu": cutemoe.SwiGLU(alpha=1.702),
    "gpt_oss": cutemoe.SwiGLU(1.702, 1.0, 7.0),
    "per_expert": PER_EXPERT,
    "gelu": cutemoe.GeGLU(),
    "gelu_tanh": cutemoe.GeGLU("tanh"),
    "relu2": cutemoe.ReLU2(),
}
every_activation = pytest.mark.parametrize("name", ACTIVATIONS)
every_dtype = pytest.mark.parametrize("format", ["bf16", "fp16"])
# routing weights in float32, or in the dtype of x
both_weights = pytest.mark.parametrize("wide", [True, False], ids=["float32", "as_x"])


def gated(h: torch.Tensor, layer: Layer, activation: Any, expert: int) -> torch.Tensor:
    """[rows, 2I] or [rows, I] -> [rows, I], as the models of transformers write it."""
    if isinstance(activation, cutemoe.ReLU2):
        return functional.relu(h).square()
    gate, up = h.chunk(2, dim=-1)
    if layer.gate_up == "interleaved":
        gate, up = h[:, ::2], h[:, 1::2]
    if isinstance(activation, cutemoe.GeGLU):
        return functional.gelu(gate, approximate=activation.approximate) * up
    alpha, beta, limit = (
        p[expert].item() if isinstance(p, torch.Tensor) else p
        for p in (activation.alpha, activation.beta, activation.limit)
    )
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    if isinstance(activation.alpha, float) and alpha == 1.0:
        gate = functional.silu(gate)
    else:
        gate = gate * torch.sigmoid(gate * alpha)
    return (up + beta) * gate if beta else gate * up


def eager(
    layer: Layer,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    activation: Any,
    wgmma: bool = False,
) -> torch.Tensor:
    """The layer with an operator of torch for every step, sums of products in float32.

    wgmma: products are those of torch._grouped_mm, in the dtype of x.
    """
    w13, w2 = (values(w, x.dtype if wgmma else torch.float32) for w in (layer.w13, layer.w2))

    def linear(t: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, e: int) -> torch.Tensor:
        if wgmma:
            ends = torch.tensor([len(t)], dtype=torch.int32, device=t.device)
            y = torch._grouped_mm(t, w[e : e + 1].transpose(1, 2), offs=ends)
        else:
            y = (t.float() @ w[e].T).to(t.dtype)
        return y if bias is None else y + bias[e].to(t.dtype)

    y = torch.zeros(*ids.shape, layer.hidden, dtype=x.dtype, device=x.device)
    for e in range(layer.experts):
        rows, slots = torch.where(ids == e)
        if len(rows):
            mid = gated(linear(x[rows], w13, layer.b13, e), layer, activation, e)
            y[rows, slots] = linear(mid, w2, layer.b2, e)
    live = (ids >= 0) & (ids < layer.experts)
    return (y * weights.masked_fill(~live, 0.0)[..., None]).sum(dim=1).to(x.dtype)


def routed(pattern: str, wide: bool, dtype: torch.dtype, *, exact: bool = False) -> Any:
    r = draw.Routing(T=T, K=K, E=E, offset=0, pattern=pattern, seed=22)
    weights = r.weights(exact=exact)
    return r.ids(), weights if wide else weights.to(dtype)


@both_weights
@every_dtype
@every_activation
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "plain"])
def test_the_reference_is_torch_bit_for_bit(name, format, biases, wide):
    activation = ACTIVATIONS[name]
    order = "interleaved" if biases else "gate_up"
    layer = random_layer(format, format, gated=is_gated(activation), gate_up=order, biases=biases)
    x = draw.normal((T, layer.hidden), 5, layer.dtype)
    ids, weights = routed("skips", wide, x.dtype)
    got = cutemoe.fused_moe(
        x, layer.prepared(), ids, weights, activation=activation, rounding="eager"
    )
    assert_same(got, eager(layer, x, ids, weights, activation))
    fused = cutemoe.fused_moe(x, layer.prepared(), ids, weights.float(), activation=activation)
    assert not torch.equal(got, fused)


@both_weights
@every_dtype
@pytest.mark.parametrize("activation", EXACT, ids=str)
def test_exact_sums_are_rounded_alike(target, activation, format, wide):
    layer = exact_layer(format, format, gated=is_gated(activation), seed=3)
    x = exact_x(T, layer, 7)
    ids, weights = routed("skips", wide, x.dtype, exact=True)
    want = eager(layer, x, ids, weights, activation)
    got = call(target, layer, x, ids, weights, activation=activation, rounding="eager")
    assert_same(got, want)


@every_dtype
@every_activation
def test_random_layers_keep_the_bound(target, name, format):
    activation, wide = ACTIVATIONS[name], format == "fp16"
    layer = random_layer(format, format, gated=is_gated(activation), seed=9)
    x = draw.normal((T, layer.hidden), 6, layer.dtype)
    ids, weights = routed("uniform", wide, x.dtype)
    peer = eager(layer, x, ids, weights, activation)
    exact = naive(layer, x, ids, weights, activation, round_mid=False)
    got = call(target, layer, x, ids, weights, activation=activation, rounding="eager")
    assert_within(got, peer, exact)


@both_weights
@pytest.mark.parametrize("top_k", [4, 5, 10])
def test_sums_over_slots_that_are_not_exact_have_the_bits_of_the_reference(target, top_k, wide):
    layer = exact_layer("bf16", "bf16", E=12, seed=3)
    x, r = exact_x(T, layer, 7), draw.Routing(T=T, K=top_k, E=12, offset=0, pattern="skips", seed=5)
    weights = r.weights() if wide else r.weights().to(x.dtype)
    options = {"activation": EXACT[0], "rounding": "eager"}
    want = cutemoe.fused_moe(x, layer.prepared(), r.ids(), weights, backend="reference", **options)
    assert_same(call(target, layer, x, r.ids(), weights, **options), want)


@pytest.mark.gpu
@both_weights
@pytest.mark.parametrize("top_k", [1, 3, 4, 5, 8, 10, 32])
def test_slots_are_added_up_in_the_order_of_torch_on_a_gpu(top_k, wide):
    from cutemoe.triton_kernels.combine import combine

    y = draw.normal((37, top_k, 320), 1, torch.bfloat16).cuda()
    weights = draw.normal((37, top_k), 2, torch.float32 if wide else torch.bfloat16).cuda()
    ids = torch.zeros(37, top_k, dtype=torch.int32, device="cuda")
    out = torch.empty(37, 320, dtype=torch.bfloat16, device="cuda")
    combine(y.float().flatten(0, 1), ids, weights, out, 1, 0, fused=False)
    assert_same(out, (y * weights[..., None]).sum(dim=1).to(out.dtype))


@pytest.mark.gpu
@every_dtype
@every_activation
def test_a_layer_has_the_bits_of_torch_on_the_same_gpu(name, format):
    """Products too: both multiply by wgmma, K ascending."""
    activation = ACTIVATIONS[name]
    layer = random_layer(format, format, gated=is_gated(activation), H=256, I=192, seed=9)
    x = draw.normal((T, layer.hidden), 6, layer.dtype)
    ids, weights = routed("skips", False, x.dtype)
    target = Target("triton", "cuda")
    got = call(target, layer, x, ids, weights, activation=activation, rounding="eager")
    on_gpu = replace(
        layer, **{n: target.put(getattr(layer, n)) for n in ("w13", "w2", "b13", "b2")}
    )
    x, ids, weights = target.put((x, ids, weights))
    assert_same(got, eager(on_gpu, x, ids, weights, activation, wgmma=True).cpu())


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int4"])
def test_quantized_weights_give_what_their_values_give(target, format):
    layer = random_layer(format, "bf16", seed=4)
    x = draw.normal((T, layer.hidden), 6, torch.bfloat16)
    ids, weights = routed("skips", False, x.dtype)
    peer = eager(layer, x, ids, weights, cutemoe.SwiGLU())
    exact = naive(layer, x, ids, weights, cutemoe.SwiGLU(), round_mid=False)
    assert_within(call(target, layer, x, ids, weights, rounding="eager"), peer, exact)


def test_the_operator_takes_weights_of_both_dtypes(monkeypatch):
    layer = random_layer("bf16")
    moe, x = layer.prepared(), draw.normal((T, layer.hidden), 6, torch.bfloat16)
    real, seen = operator.fused_moe, []
    monkeypatch.setattr(operator, "fused_moe", lambda *a: seen.append(a) or real(*a))
    for wide in (True, False):
        ids, weights = routed("uniform", wide, x.dtype)
        want = cutemoe.fused_moe(x, moe, ids, weights, rounding="eager")
        torch.library.opcheck(torch.ops.cutemoe.fused_moe.default, seen[-1])
        torch._dynamo.reset()
        monkeypatch.undo()
        compiled = torch.compile(cutemoe.fused_moe, fullgraph=True, backend="aot_eager")
        assert_same(compiled(x, moe, ids, weights, rounding="eager"), want)
        monkeypatch.setattr(operator, "fused_moe", lambda *a: seen.append(a) or real(*a))
        found = cutemoe.explain("fused_moe", x, moe, ids, weights, rounding="eager")
        assert found.problem.rounding == "eager"


def test_both_dtypes_are_those_of_the_messages():
    layer = random_layer("bf16")
    x = draw.normal((T, layer.hidden), 6, DTYPES["bf16"])
    ids, weights = routed("uniform", False, x.dtype)
    with pytest.raises(cutemoe.InvalidCall, match=r"weights: .*or rounding='eager'"):
        cutemoe.fused_moe(x, layer.prepared(), ids, weights)
    codes = random_layer("mxfp4", "fp8").prepared()
    with pytest.raises(cutemoe.InvalidCall, match=r"rounding: .*prepare_moe\(activations='bf16'"):
        cutemoe.fused_moe(x, codes, ids, weights, rounding="eager")
