"""Inputs whose every sum is a float32 number: results equal the float64 oracle bit for bit."""

import pytest
import torch
from hypothesis import given, settings

import cutemoe
from tests import strategies as draw
from tests.close import assert_same
from tests.gemm.cases import (
    COMBINATIONS,
    X,
    call,
    exact_x,
    group_sizes,
    naive,
    offsets_of,
    out_dtype,
    sum_bits,
)
from tests.moe.cases import assert_order_free, exact_weight, values

SHARE = 0.5


def check(target, format, kind, sizes, tail, seed, n=48, k=96, scale=None, prepared=True) -> None:
    w = exact_weight(format, (len(sizes), n, k), seed)
    offsets = offsets_of(sizes)
    rows = sum(sizes) + tail
    bits = sum_bits(target, kind)
    x = exact_x(rows, k, kind, seed + 3, 8 if bits == 24 else 1)
    x_scale = None if scale is None else draw.powers_of_two((rows,) if scale else (), seed + 4)
    for g in range(len(sizes)):
        for row in x[offsets[g] : offsets[g + 1]]:
            assert_order_free(row, values(w, torch.float64)[g], bits)
    want = naive(x, w, offsets, x_scale)
    got = call(target, x, w, offsets, x_scale, prepared=prepared)
    assert_same(got, want.to(out_dtype(x)))


@pytest.mark.parametrize("prepared", [True, False], ids=["packed", "rows"])
@pytest.mark.parametrize(("format", "kind"), COMBINATIONS)
def test_every_combination_of_formats(target, format, kind, prepared):
    check(target, format, kind, [3, 0, 17, 1, 0], 2, 5, prepared=prepared)


@pytest.mark.parametrize("scale", [0, 1], ids=["tensor", "rows"])
@pytest.mark.parametrize("format", ["int4", "mxfp4", "fp8"])
def test_scales_of_x(target, format, scale):
    check(target, format, "fp8", [3, 0, 17, 1, 0], 2, 6, scale=scale)


@pytest.mark.parametrize(("n", "k"), [(1, 32), (33, 32), (64, 64), (130, 288), (16, 544)])
def test_widths_that_no_tile_divides(target, n, k):
    check(target, "mxfp4", "bf16", [5, 18], 0, 7, n=n, k=k)


@pytest.mark.parametrize(("n", "k"), [(1, 1), (3, 7), (40, 50)])
def test_dense_weights_of_any_width(target, n, k):
    check(target, "bf16", "bf16", [5, 18], 1, 8, n=n, k=k)


@pytest.mark.parametrize(("format", "kind"), [("mxfp4", "bf16"), ("int4", "fp8")])
@settings(max_examples=draw.examples(SHARE))
@given(sizes=group_sizes(), seed=draw.seeds())
def test_any_groups(target, format, kind, sizes, seed):
    check(target, format, kind, sizes, seed % 3, seed)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int4"])
def test_one_hot_rows_return_every_weight(target, format, kind):
    """All 16 codes under ordinary, non-trivial scales, rounded once to the output."""
    n, k = 24, 64
    w = cutemoe.quantize(
        draw.normal((2, n, k), 9), format, group_size=32 if format == "int4" else None
    )
    x = torch.eye(k, dtype=X[kind])
    got = call(target, torch.cat([x, x]), w, offsets_of([k, k]), prepared=True)
    codes, over = w, None
    if format == "nvfp4":
        # the global scale multiplies the float32 sum
        codes = cutemoe.QuantizedTensor(w.data, w.scale, format=format)
        over = w.global_scale
    want = codes.dequantize().transpose(1, 2).reshape(2 * k, n)
    want = want if over is None else want * over
    assert_same(got, want.to(x.dtype))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp8"])
def test_groups_of_int4(target, kind, group):
    """Tokens of one column return code times scale, for every column and scales of any mantissa."""
    k = 256
    w = cutemoe.quantize(draw.normal((2, 80, k), 9), "int4", group_size=group)
    x = torch.eye(k).to(X[kind])
    got = call(target, torch.cat([x, x]), w, offsets_of([k, k]), prepared=True)
    want = w.dequantize().transpose(1, 2).reshape(2 * k, 80)
    assert_same(got, want.to(out_dtype(x)))


@pytest.mark.parametrize("span", [0, 11])
def test_scales_of_mxfp4_under_fp8(target, span):
    """One column a token, scales up to 11 octaves apart within 128 columns."""
    k = 192
    data = draw.random_bytes((1, 80, k // 2), 3)
    scale = 100 + draw.random_bytes((1, 80, k // 32), 4) % (span + 1)
    w = cutemoe.QuantizedTensor(data, scale.to(torch.uint8), format="mxfp4")
    x = torch.eye(k).to(X["fp8"])
    got = call(target, x, w, offsets_of([k]), prepared=True)
    assert_same(got, w.dequantize()[0].T.bfloat16())


@pytest.mark.parametrize("prepared", [True, False], ids=["packed", "rows"])
def test_every_e8m0_scale_and_code(target, prepared):
    """Scales whose values are ordinary in bf16, by all 16 codes; a group spans 130 octaves."""
    scales = torch.stack([torch.arange(16, 146), torch.arange(110, 240)]).to(torch.uint8)
    data = torch.arange(16, dtype=torch.uint8) | (torch.arange(16, dtype=torch.uint8) << 4)
    data = data.expand(*scales.shape, 16).contiguous()
    w = cutemoe.QuantizedTensor(data, scales[..., None], format="mxfp4")
    x = torch.eye(32, dtype=torch.bfloat16).repeat(2, 1)
    got = call(target, x, w, offsets_of([32, 32]), prepared=prepared)
    assert_same(got, w.dequantize().transpose(1, 2).flatten(0, 1).bfloat16())


def test_prepared_weights_give_the_same_bits(target):
    w = exact_weight("nvfp4", (3, 48, 64), 1)
    x, offsets = exact_x(9, 64, "bf16", 2), offsets_of([4, 0, 5])
    got = call(target, x, w, offsets, prepared=True)
    assert_same(got, call(target, x, w, offsets))
