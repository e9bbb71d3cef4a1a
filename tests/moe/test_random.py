"""Random layers: the error against float64 is at most twice that of torch, plus one ulp.

Where activations are quantised, the oracle does not quantise the FC1 activation: that step's own
error is then in both errors, and the rare code that flips between two correct float32 sums is
nothing special. test_exact.py fixes its bits.
"""

import pytest
import torch

import cutemoe
from tests import strategies as draw
from tests.close import assert_within
from tests.moe.cases import (
    COMBINATIONS,
    DTYPES,
    W4A16,
    Layer,
    Target,
    call,
    is_gated,
    naive,
    random_layer,
)

GPT_OSS = cutemoe.SwiGLU(alpha=1.702, beta=1.0, limit=7.0)
ACTIVATIONS = (
    cutemoe.SwiGLU(),
    GPT_OSS,
    cutemoe.SwiGLU(alpha=0.5, beta=-0.5, limit=0.75),
    cutemoe.GeGLU(),
    cutemoe.GeGLU("tanh"),
    cutemoe.ReLU2(),
)


def check(
    target: Target, layer: Layer, activation: object, r: draw.Routing, dtype: torch.dtype
) -> None:
    x = draw.normal((r.T, layer.hidden), r.seed + 9, dtype)
    ids, weights = r.ids(), r.weights()
    round_mid = layer.activations in DTYPES
    exact = naive(layer, x, ids, weights, activation, offset=r.offset, round_mid=round_mid)
    peer = naive(layer, x, ids, weights, activation, offset=r.offset, dtype=torch.float32)
    got = call(target, layer, x, ids, weights, activation=activation, expert_offset=r.offset)
    assert_within(got, peer.to(dtype), exact)


@pytest.mark.parametrize(("format", "activations"), COMBINATIONS)
def test_every_combination_of_formats(target, format, activations):
    layer = random_layer(format, activations, gate_up="interleaved", seed=8)
    r = draw.Routing(T=13, K=2, E=5, offset=2, pattern="skips", seed=21)
    check(target, layer, GPT_OSS, r, layer.dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize(
    ("format", "activations"),
    [("mxfp4", "bf16"), ("fp16", "fp16"), ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), W4A16],
)
def test_every_activation(target, format, activations, activation):
    layer = random_layer(format, activations, gated=is_gated(activation), seed=9)
    r = draw.Routing(T=9, K=3, E=5, offset=0, pattern="uniform", seed=22)
    check(target, layer, activation, r, layer.dtype)


@pytest.mark.parametrize("scale", [0.02, (0.02, 0.05), (torch.tensor([0.02]), 0.05)], ids=str)
def test_static_fp8_scales(target, scale):
    layer = random_layer("int4", "fp8", input_scale=scale, seed=10)
    r = draw.Routing(T=9, K=2, E=5, offset=0, pattern="uniform", seed=23)
    check(target, layer, GPT_OSS, r, torch.float16)


WIDTHS = [(32, 32), (160, 96), (96, 288), (544, 64)]


@pytest.mark.parametrize(
    ("format", "activations", "H", "I"),
    [("mxfp4", "bf16", *w) for w in WIDTHS]
    + [("mxfp4", "mxfp4", *w) for w in [*WIDTHS, (192, 224)]]
    + [("nvfp4", "nvfp4", *w) for w in [*WIDTHS, (16, 16), (80, 48), (272, 144)]]
    + [pytest.param("nvfp4", "bf16", *w, marks=pytest.mark.gpu) for w in [(16, 16), (272, 144)]],
)
def test_widths_that_no_tile_divides(target, format, activations, H, I):  # noqa: E741
    layer = random_layer(format, activations, H=H, I=I, seed=11)
    r = draw.Routing(T=19, K=2, E=5, offset=0, pattern="skewed", seed=24)
    check(target, layer, GPT_OSS, r, layer.dtype)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_groups(target, group):
    w13 = cutemoe.quantize(draw.normal((4, 256, 256), 1, scale=1 / 16), "int4", group_size=group)
    w2 = cutemoe.quantize(draw.normal((4, 256, 128), 2, scale=1 / 11), "int4", group_size=group)
    r = draw.Routing(T=6, K=2, E=4, offset=0, pattern="uniform", seed=25)
    check(target, Layer(w13, w2, activations="fp8"), cutemoe.SwiGLU(), r, torch.bfloat16)


@pytest.mark.parametrize(
    ("format", "activations"), [("mxfp4", "bf16"), ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), W4A16]
)
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 33, 65, 100, 300])
def test_rows_on_one_expert_around_a_tile(target, format, activations, tokens):
    layer = random_layer(format, activations, E=3, seed=12)
    r = draw.Routing(T=tokens, K=1, E=3, offset=0, pattern="one expert", seed=26)
    check(target, layer, GPT_OSS, r, layer.dtype)
