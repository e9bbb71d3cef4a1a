"""Inputs whose every sum is a float32 number: results equal the float64 oracle bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cutemoe
from tests import strategies as draw
from tests.close import assert_same, assert_within
from tests.moe.cases import (
    COMBINATIONS,
    EXACT,
    SATURATED,
    W4A16,
    Layer,
    call,
    exact_layer,
    exact_x,
    is_gated,
    naive,
)

ids_of = "{}-{}".format


@pytest.mark.parametrize("rows", [False, True], ids=["packed", "rows"])
@pytest.mark.parametrize("gate_up", ["gate_up", "up_gate", "interleaved"])
@pytest.mark.parametrize(("format", "activations"), COMBINATIONS)
def test_every_combination_of_formats(target, format, activations, gate_up, rows):
    """Bit for bit, but for fp8 in CuTe: FC2 has sums of 16 bits here, of which wgmma of fp8 keeps
    12, so those obey the tolerance rule; tests/gemm has sums that fit, bit for bit."""
    layer = exact_layer(format, activations, gate_up=gate_up, seed=3)
    r = draw.Routing(T=7, K=2, E=5, offset=0, pattern="skips", seed=11)
    x, ids, weights = exact_x(7, layer, 5), r.ids(), r.weights(exact=True)
    want = naive(layer, x, ids, weights, SATURATED, exact=True)
    got = call(target, layer, x, ids, weights, activation=SATURATED, rows=rows)
    if (target.backend, activations) == ("cute", "fp8"):
        assert_within(got, want.to(x.dtype), want)
    else:
        assert_same(got, want.to(x.dtype))


@pytest.mark.parametrize(
    ("format", "activations"), [("mxfp4", "bf16"), ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), W4A16]
)
@pytest.mark.parametrize("activation", EXACT, ids=str)
@pytest.mark.parametrize("biases", [True, False], ids=["biases", "plain"])
def test_every_exact_activation(target, format, activations, activation, biases):
    layer = exact_layer(format, activations, gated=is_gated(activation), biases=biases)
    r = draw.Routing(T=9, K=3, E=5, offset=0, pattern="uniform", seed=1)
    x, ids, weights = exact_x(9, layer, 7), r.ids(), r.weights(exact=True)
    want = naive(layer, x, ids, weights, activation, exact=True)
    got = call(target, layer, x, ids, weights, activation=activation)
    assert_same(got, want.to(x.dtype))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_geglu_far_from_zero(target, approximate):
    """Gates are multiples of 16, where gelu is the identity or zero in every precision."""
    layer = exact_layer("int4", biases=False)
    r = draw.Routing(T=6, K=2, E=5, offset=0, pattern="uniform", seed=2)
    x, ids, weights = 64 * exact_x(6, layer, 7), r.ids(), r.weights(exact=True)
    activation = cutemoe.GeGLU(approximate)
    want = naive(layer, x, ids, weights, activation, exact=True)
    got = call(target, layer, x, ids, weights, activation=activation)
    assert_same(got, want.to(x.dtype))


@pytest.mark.parametrize(
    ("format", "activations"), [("mxfp4", "bf16"), ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), W4A16]
)
def test_parameters_of_each_expert(target, format, activations):
    layer = exact_layer(format, activations)
    activation = cutemoe.SwiGLU(
        alpha=torch.tensor([4096.0, 8192.0, 4096.0, 16384.0, 4096.0]),
        beta=torch.arange(5) / 4,
        limit=torch.arange(3, 8).float(),
    )
    r = draw.Routing(T=9, K=2, E=5, offset=0, pattern="uniform", seed=4)
    x, ids, weights = exact_x(9, layer, 7), r.ids(), r.weights(exact=True)
    want = naive(layer, x, ids, weights, activation, exact=True)
    assert_same(call(target, layer, x, ids, weights, activation=activation), want.to(x.dtype))


@pytest.mark.parametrize(("format", "gain"), [("mxfp4", 4.0), ("nvfp4", 6.0), ("int4", 7.0)])
def test_dynamic_fp8_scales(target, format, gain):
    """A layer that multiplies positive rows by gain^2, and row scales that float32 holds."""
    n = 64
    eye = gain * torch.eye(n).expand(2, n, n)
    group = 32 if format == "int4" else None
    over = 0.25 if format == "nvfp4" else None
    w13 = cutemoe.quantize(
        torch.cat([eye, 0 * eye], dim=1), format, group_size=group, global_scale=over
    )
    w2 = cutemoe.quantize(eye, format, group_size=group, global_scale=over)
    layer = Layer(w13, w2, activations="fp8")
    x = torch.exp2(18 * torch.rand(12, n, generator=draw.generator(1)) - 10)
    x[:, 5] = 448 * draw.powers_of_two((12,), 2, -3, 2)
    x = torch.minimum(x, x[:, 5:6]).bfloat16()
    ids, weights = torch.arange(12)[:, None].int() % 2, torch.ones(12, 1)
    activation = cutemoe.SwiGLU(alpha=2.0**20, beta=1.0)
    want = naive(layer, x, ids, weights, activation, exact=True)
    got = call(target, layer, x, ids, weights, activation=activation)
    assert_same(got, want.to(x.dtype))


def test_experts_without_rows_are_not_read_into_results(target):
    layer = exact_layer("bf16")
    layer.w13[3], layer.w2[1], layer.b2[1] = torch.nan, torch.nan, torch.nan
    ids = torch.tensor([[0, 2], [4, 0], [2, 4]], dtype=torch.int32)
    x, weights = exact_x(3, layer, 7), torch.ones(3, 2)
    got = call(target, layer, x, ids, weights, activation=SATURATED)
    assert_same(got, naive(layer, x, ids, weights, SATURATED, exact=True).to(x.dtype))


@pytest.mark.parametrize("offset", [0, 1000])
@pytest.mark.parametrize(("T", "K"), [(1, 1), (1, 2), (31, 1), (16, 2), (11, 3), (16, 4), (13, 5)])
def test_few_rows(target, T, K, offset):
    """To 64 slots and one more: each drawn, all of one expert, none live, a token's all alike."""
    layer = exact_layer("mxfp4", E=5)
    x = exact_x(T, layer, 7)
    drawn = torch.randint(-1, 6, (T, K), generator=draw.generator(T)) + offset
    strided = target.put(torch.cat([drawn, 0 * drawn], 1))[:, :K]
    weights = draw.powers_of_two((T, K), 3, -2, 2)
    one = torch.full_like(drawn, offset + 4)
    for ids in (drawn, strided, one, one + 1, drawn[:, :1].expand(T, K).int()):
        want = naive(layer, x, ids.cpu(), weights, SATURATED, offset=offset, exact=True)
        got = call(target, layer, x, ids, weights, activation=SATURATED, expert_offset=offset)
        assert_same(got, want.to(x.dtype))


@pytest.mark.parametrize(
    ("format", "activations", "activation"),
    [
        ("mxfp4", "bf16", SATURATED),
        ("mxfp4", "fp16", cutemoe.ReLU2()),
        ("int4", "bf16", SATURATED),
    ],
    ids=str,
)
@pytest.mark.parametrize("I", [64, 192, 256])
@pytest.mark.parametrize("T", [2, 23, 61, 250])
def test_whole_units_between_the_gemms(target, format, activations, activation, I, T):  # noqa: E741
    """Multiples of 64, which a kernel may keep in tiles, of every width; skipped ids among them."""
    gated = is_gated(activation)
    layer = exact_layer(format, activations, gated=gated, H=128, I=I, seed=I)
    r = draw.Routing(T=T, K=2, E=5, offset=1, pattern="skips", seed=T)
    x, ids, weights = exact_x(T, layer, 5), r.ids(), r.weights(exact=True)
    want = naive(layer, x, ids, weights, activation, offset=1, exact=True)
    got = call(target, layer, x, ids, weights, activation=activation, expert_offset=1)
    assert_same(got, want.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activations", ["fp8", "nvfp4", "mxfp4"])
def test_quantised_activations_take_both_dtypes(target, activations, dtype):
    layer = exact_layer("mxfp4" if activations == "mxfp4" else "nvfp4", activations)
    r = draw.Routing(T=5, K=2, E=5, offset=0, pattern="uniform", seed=5)
    x, ids, weights = exact_x(5, layer, 7).to(dtype), r.ids(), r.weights(exact=True)
    want = naive(layer, x, ids, weights, SATURATED, exact=True)
    got = call(target, layer, x, ids, weights, activation=SATURATED)
    assert got.dtype == dtype
    assert_same(got, want.to(dtype))


@pytest.mark.parametrize(
    ("format", "activations"),
    [("mxfp4", "bf16"), ("bf16", "bf16"), ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), W4A16],
)
@settings(max_examples=draw.examples(0.4))
@given(r=draw.routings(), seed=draw.seeds(), wide=st.booleans())
def test_any_routing(target, format, activations, r, seed, wide):
    layer = exact_layer(format, activations, E=r.E, seed=seed % 1000)
    x = exact_x(r.T, layer, seed)
    ids, weights = r.ids(torch.int64 if wide else torch.int32), r.weights(exact=True)
    want = naive(layer, x, ids, weights, SATURATED, offset=r.offset, exact=True)
    got = call(target, layer, x, ids, weights, activation=SATURATED, expert_offset=r.offset)
    assert_same(got, want.to(x.dtype))
