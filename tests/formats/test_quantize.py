"""The quantisers against an independent implementation, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cutemoe
from cutemoe.formats import FORMATS, format, nvfp4
from tests import strategies as draw
from tests.close import assert_same
from tests.formats import oracle

CASES = [(f, g) for f, groups in oracle.GROUPS.items() for g in groups]
cases = pytest.mark.parametrize(("name", "group"), CASES, ids=lambda v: str(v))


def check(x: torch.Tensor, name: str, group: int, global_scale: float | None = None) -> None:
    """x [R, K] is quantized as the oracle does."""
    q = cutemoe.quantize(x, name, group_size=group or None, global_scale=global_scale)
    d = None
    if name == "nvfp4":
        d = oracle.default_global(x) if global_scale is None else np.float32(global_scale)
        assert q.global_scale is not None
        assert q.global_scale.numpy().view(np.uint32) == d.view(np.uint32)
    codes, scale = oracle.quantized(x, name, group, d)
    np.testing.assert_array_equal(
        _no_nan_sign(oracle.scale_bytes(q), name), _no_nan_sign(scale, name)
    )
    np.testing.assert_array_equal(
        _no_nan_sign(oracle.codes_of(q), name, codes=True), _no_nan_sign(codes, name, codes=True)
    )


def _no_nan_sign(bits: np.ndarray, name: str, codes: bool = False) -> np.ndarray:
    """One NaN for all: its sign and payload mean nothing."""
    if codes:
        return np.where((bits & 0x7F) == 0x7F, 0x7F, bits) if name == "fp8" else bits
    values = oracle.scale_values(name, bits)
    canonical = {"mxfp4": 255, "nvfp4": 0x7F, "int4": 0x7FC0, "fp8": 0x7FC00000}[name]
    return np.where(np.isnan(values), canonical, bits).astype(bits.dtype)


def test_every_format_has_an_oracle():
    assert set(FORMATS) == set(oracle.GROUPS)
    for name, f in FORMATS.items():
        assert (f.group_sizes or (0,)) == oracle.GROUPS[name]


@cases
def test_every_bfloat16_as_the_largest_of_its_block(name, group):
    v = oracle.every_bfloat16().float()
    fractions = torch.linspace(-1, 1, group or 8)
    fractions[0] = 1
    x = v[:, None] * fractions
    for d in (None, 1.0, 2.0**-20) if name == "nvfp4" else (None,):
        check(x, name, group, d)


@cases
def test_every_bfloat16_beside_a_larger_value(name, group):
    width = group or 64
    for top in (6.0, 7.0, 1.0):
        v = oracle.every_bfloat16().float()
        v = v[torch.isfinite(v) & (v.abs() <= top)]
        v = v[: len(v) // (width - 1) * (width - 1)].view(-1, width - 1)
        x = torch.cat((torch.full((len(v), 1), top), v), dim=1)
        check(x, name, group, 1 / 448 if name == "nvfp4" else None)


@cases
@given(
    seed=draw.seeds(),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 3),
    spread=st.sampled_from((0.0, 1.0, 8.0, 40.0)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
)
def test_random_tensors(name, group, seed, rows, blocks, spread, dtype):
    g = draw.generator(seed)
    shape = (rows, blocks, group or 24)
    x = torch.randn(shape, generator=g) * torch.exp2(torch.randn(shape[:2], generator=g) * spread)[
        ..., None
    ].clamp(2.0**-126, 2.0**120)
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, 3.4e38])
    pick = torch.randint(0, 7, shape, generator=g)
    x = torch.where(torch.rand(shape, generator=g) < 0.01, special[pick], x)
    check(x.flatten(1).to(dtype), name, group)


@given(seed=draw.seeds(), exponent=st.integers(-118, 120))
def test_nvfp4_with_any_global_scale(seed, exponent):
    """Blocks from far below the scale (all codes 0) to far above it (saturated)."""
    d = float(np.float32(2.0**exponent * 1.37))
    g = draw.generator(seed)
    x = torch.randn(8, 32, generator=g) * 2.0 ** max(-126, min(120, exponent))
    x = x * torch.exp2(torch.randint(-20, 16, (8, 1), generator=g).float())
    check(x, "nvfp4", 16, d)


@given(seed=draw.seeds())
def test_nvfp4_scales_at_ties(seed):
    """Scales about half way between two e4m3 values: there the order of the products shows."""
    grid = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (grid[1:] + grid[:-1]) / 2
    d = np.float32(seed % 9973 + 1) / np.float32(4096)
    amax = ties / (np.float32(1) / d * np.float32(1 / 6))
    steps = torch.arange(-4, 5, dtype=torch.int32)
    amax = (amax.view(torch.int32)[:, None] + steps).view(torch.float32).flatten()
    x = amax[:, None] * torch.linspace(1, -0.9, 16)
    check(x, "nvfp4", 16, float(d))


@cases
@given(seed=draw.seeds(), rows=st.integers(1, 4), spread=st.sampled_from((0.0, 3.0)))
def test_quantizing_again_changes_no_code(name, group, seed, rows, spread):
    g = draw.generator(seed)
    x = torch.randn(rows, (group or 32) * 2, generator=g)
    x = x * torch.exp2(torch.randn(rows, 1, generator=g) * spread)
    q = cutemoe.quantize(x, name, group_size=group or None)
    r = cutemoe.quantize(
        q.dequantize(), name, group_size=group or None, global_scale=q.global_scale
    )
    np.testing.assert_array_equal(oracle.codes_of(q), oracle.codes_of(r))
    if name == "fp8":
        # 448 * scale rounds, so the scale may move by an ulp, and no code with it
        assert ((r.scale.view(torch.int32) - q.scale.view(torch.int32)).abs() <= 1).all()
    else:
        np.testing.assert_array_equal(oracle.scale_bytes(q), oracle.scale_bytes(r))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "int4"])
@given(seed=draw.seeds())
def test_codes_of_any_scale_survive_a_round_trip(name, seed):
    """Random codes whose block holds the largest code: nothing else about them is special."""
    width = FORMATS[name].group_sizes[0]
    q = draw.exact_quantized(name, (3, width), seed)
    codes = torch.from_numpy(oracle.codes_of(q)).clone()
    codes[:, 0] = 7
    if name == "int4":
        codes[codes == 8] = 9
    q = cutemoe.QuantizedTensor(codes[:, 0::2] | codes[:, 1::2] << 4, q.scale, format=name)
    r = cutemoe.quantize(q.dequantize(), name, global_scale=1.0 if name == "nvfp4" else None)
    assert torch.equal(q.data, r.data) and torch.equal(q.scale.float(), r.scale.float())


@cases
def test_a_broken_value_breaks_its_block_only(name, group):
    width = group or 16
    for bad in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(2, 2 * width)
        x[1, width + 3] = bad
        y = cutemoe.quantize(x, name, group_size=group or None).dequantize()
        assert torch.isfinite(y[0]).all()
        # fp8 has a scale a row
        assert torch.isfinite(y[1, :width]).all() or not group
        assert torch.isnan(y[1, width:]).all() or not group
        assert torch.isnan(y[1, width + 3])


@cases
def test_zeros_and_values_that_underflow(name, group):
    for value in (0.0, 1e-45, -1e-45, 1e-38):
        y = cutemoe.quantize(torch.full((2, 128), value), name, group_size=group or None)
        got = y.dequantize()
        assert torch.isfinite(got).all() and (got.abs() <= 2e-38).all()


def test_tiny_nvfp4_tensors_do_not_overflow():
    """Without a least global scale 1 / scale is infinite, and zeros become the largest code."""
    x = torch.tensor([1e-37, 0.0, 5e-38] + [0.0] * 13).expand(2, 16)
    q = cutemoe.quantize(x, "nvfp4")
    assert q.global_scale == nvfp4.GLOBAL_MIN
    assert (q.dequantize()[:, 1] == 0).all() and torch.isfinite(q.dequantize()).all()


@cases
def test_chunks_do_not_show(name, group, monkeypatch):
    x = draw.normal((7, 3, 128), 3)
    d = draw.normal((7,), 4).abs() / 100 if name == "nvfp4" else None
    whole = cutemoe.quantize(x, name, group_size=group or None, global_scale=d)
    value = whole.dequantize(torch.bfloat16)
    monkeypatch.setattr(format, "_CHUNK_CPU", 300)
    parts = cutemoe.quantize(x, name, group_size=group or None, global_scale=d)
    assert torch.equal(parts.data.view(torch.uint8), whole.data.view(torch.uint8))
    assert torch.equal(parts.scale.view(torch.uint8), whole.scale.view(torch.uint8))
    assert torch.equal(parts.dequantize(torch.bfloat16), value)


@pytest.mark.parametrize("lead", [(), (0,), (3, 0), (2, 0, 2), (1,), (2, 1, 3)])
@cases
def test_leading_dimensions(name, group, lead):
    x = draw.normal((*lead, 128), 5)
    q = cutemoe.quantize(x, name, group_size=group or None)
    assert q.shape == x.shape and q.dequantize().shape == x.shape
    g = q.global_scale
    for i, row in enumerate(x.reshape(-1, 128) if x.numel() else ()):
        one = cutemoe.quantize(row, name, group_size=group or None, global_scale=g)
        same = q.data.reshape(-1, q.data.shape[-1])[i]
        assert torch.equal(one.data.view(torch.uint8), same.view(torch.uint8))


@cases
def test_strided_input(name, group):
    x = draw.normal((128, 6), 7)
    a = cutemoe.quantize(x.T, name, group_size=group or None)
    b = cutemoe.quantize(x.T.contiguous(), name, group_size=group or None)
    assert torch.equal(a.data.view(torch.uint8), b.data.view(torch.uint8))


def test_a_global_scale_for_each_expert():
    x = draw.normal((3, 4, 32), 9) * torch.tensor([1.0, 10.0, 0.01])[:, None, None]
    d = torch.tensor([0.001, 0.02, 0.00001])
    q = cutemoe.quantize(x, "nvfp4", global_scale=d)
    for e in range(3):
        one = cutemoe.quantize(x[e], "nvfp4", global_scale=float(d[e]))
        assert torch.equal(q[e].data, one.data)
        assert torch.equal(q[e].dequantize(), one.dequantize())


@pytest.mark.gpu
@cases
def test_a_gpu_gives_the_same_bits(name, group):
    x = torch.cat((draw.normal((4096, 128), 1), oracle.every_bfloat16().float().view(-1, 128)))
    for values in (x, x * 1.7e-3):
        a = cutemoe.quantize(values, name, group_size=group or None)
        b = cutemoe.quantize(values.cuda(), name, group_size=group or None).to("cpu")
        check(values, name, group)
        np.testing.assert_array_equal(oracle.codes_of(a), oracle.codes_of(b))
        np.testing.assert_array_equal(
            _no_nan_sign(oracle.scale_bytes(a), name), _no_nan_sign(oracle.scale_bytes(b), name)
        )
        assert_same(b.dequantize(), a.dequantize())
