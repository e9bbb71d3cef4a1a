"""Random inputs: the error against float64 is at most twice that of torch, plus one ulp."""

import pytest
import torch

import cutemoe
from tests import strategies as draw
from tests.close import assert_within
from tests.gemm.cases import COMBINATIONS, X, call, naive, offsets_of, out_dtype
from tests.moe.cases import DTYPES


def weight(format: str, shape: tuple[int, ...], seed: int):
    w = draw.normal(shape, seed, scale=shape[-1] ** -0.5)
    if format in DTYPES:
        return w.to(DTYPES[format])
    return cutemoe.quantize(w, format, group_size=32 if format == "int4" else None)


@pytest.mark.parametrize(("format", "kind"), COMBINATIONS)
def test_every_combination_of_formats(target, format, kind):
    sizes = [7, 0, 1, 21]
    w = weight(format, (4, 80, 160), 1)
    x = draw.normal((sum(sizes) + 2, 160), 2).to(X[kind])
    x_scale = torch.rand(x.shape[0], generator=draw.generator(3)) + 0.5 if kind == "fp8" else None
    offsets = offsets_of(sizes)
    exact = naive(x, w, offsets, x_scale)
    peer = naive(x, w, offsets, x_scale, torch.float32).to(out_dtype(x))
    assert_within(call(target, x, w, offsets, x_scale), peer, exact)


def test_fp16_output_of_fp8_x(target):
    w, offsets = weight("int4", (2, 32, 64), 1), offsets_of([3, 5])
    x = draw.normal((8, 64), 2).to(torch.float8_e4m3fn)
    out = torch.empty(8, 32, dtype=torch.float16, device=target.device)
    got = call(target, x, w, offsets, out=out)
    assert got.dtype == torch.float16
    exact = naive(x, w, offsets)
    assert_within(got, naive(x, w, offsets, dtype=torch.float32).half(), exact)
