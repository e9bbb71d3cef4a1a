"""Quantised activations equal cutemoe.formats bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutemoe.formats import e2m1, fp8, nvfp4
from tests import strategies as draw
from tests.close import assert_same

quantize = pytest.importorskip("cutemoe.triton_kernels.quantize", reason="triton is not installed")

INPUTS = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])
SPECIALS = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 448.0, 464.0, 2.0**-9, 2.0**-10)


def rows(n: int, width: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Rows of every magnitude, one of zeros, and one value of SPECIALS in some."""
    g = draw.generator(seed)
    x = torch.randn(n, width, generator=g) * 10.0 ** torch.randint(-6, 5, (n, 1), generator=g)
    x[0] = 0
    at = torch.randint(0, n, (3,), generator=g)
    which = torch.randint(0, len(SPECIALS), (3,), generator=g)
    for row, w in zip(at.tolist(), which.tolist(), strict=True):
        x[row, int(torch.randint(0, width, (1,), generator=g))] = SPECIALS[w]
    return x.to(dtype)


KEPT = st.sampled_from([torch.bfloat16, torch.float8_e4m3fn])


@given(n=st.integers(1, 6), width=st.integers(1, 70), dtype=INPUTS, kept=KEPT, seed=draw.seeds())
def test_fp8_by_row(n, width, dtype, kept, seed):
    x = rows(n, width, dtype, seed)
    out, scale = torch.full((n, width), 7.0).to(kept), torch.full((n,), 7.0)
    quantize.quantize(x, out, "fp8", scale=scale)
    want = fp8.row_scale(x.float())
    assert_same(scale, want)
    assert_same(out.float(), fp8.encode_with(x.float(), want).float(), signed_zeros=True)


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
@given(dtype=INPUTS, seed=draw.seeds(), blocks=st.integers(1, 5), gather=st.booleans())
def test_by_expert(format, dtype, seed, blocks, gather):
    """Sorted rows under the multiplier of their expert; rows of no expert are left alone."""
    x = rows(9, 16 * blocks, dtype, seed)
    start = torch.tensor([0, 4, 4, 7], dtype=torch.int32)
    scale = torch.tensor([0.3, 1.0, 0.007])
    slots = torch.tensor([6, 2, 17, 0, 11, 14, 4, 8, 9], dtype=torch.int32)
    out = torch.full(x.shape, 7.0).bfloat16()
    kwargs = {"slots": slots, "divide": 2} if gather else {}
    quantize.quantize(x, out, format, expert_scale=scale, start=start, **kwargs)
    source = x.float()[slots.long() // 2 if gather else slice(None)][:7]
    s = scale[[0, 0, 0, 0, 2, 2, 2]]
    if format == "fp8":
        want = fp8.encode_with(source, s).float()
    else:
        code, block = nvfp4.encode_blocks(source.unflatten(-1, (-1, 16)), 1.0 / s[:, None])
        want = (e2m1.decode(code) * block.float()[..., None]).flatten(-2)
    assert_same(out[:7].float(), want, signed_zeros=True)
    assert (out[7:] == 7).all()


def test_every_tie_of_e4m3():
    """Midpoints between neighbours, and their float32 neighbours on both sides."""
    value = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    tie = (value[1:] + value[:-1]) / 2
    edges = [tie, torch.nextafter(tie, tie * 2), torch.nextafter(tie, tie / 2), value]
    x = torch.cat(edges)
    x = torch.cat([x, -x])[None]
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    start = torch.tensor([0, 1], dtype=torch.int32)
    quantize.quantize(x, out, "fp8", expert_scale=torch.ones(1), start=start)
    assert_same(out.float(), x.to(torch.float8_e4m3fn).float(), signed_zeros=True)


def test_every_byte_widens():
    x = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).reshape(2, 128)
    out = torch.empty(x.shape, dtype=torch.bfloat16)
    quantize.widen(x, out)
    assert_same(out, x.bfloat16(), signed_zeros=True)
