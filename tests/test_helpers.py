"""The test helpers themselves: each must be able to fail."""

import pytest
import torch
from hypothesis import given

from tests import strategies as draw
from tests.close import assert_same, assert_within, ulp
from tests.poison import Poison, kept


def test_ulp_is_the_distance_to_the_next_value():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for v in (1.0, 1.5, -2.0, 3.0, 0.0, 1e-30, 2.0**-14):
            x = torch.tensor(v, dtype=dtype)
            bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
            up = (x.abs().view(bits) + 1).view(dtype)
            step = up.double() - x.abs().double()
            assert ulp(x.double(), dtype) == step, (dtype, v)


def test_the_tolerance_rule_passes_and_fails():
    oracle = draw.normal((64, 8), 1).double()
    torch_path = (oracle * (1 + 2e-3)).to(torch.bfloat16)
    assert_within(oracle.to(torch.bfloat16), torch_path, oracle)
    bad = oracle.to(torch.bfloat16)
    bad[3, 5] += 1
    with pytest.raises(AssertionError, match=r"at \(3, 5\)"):
        assert_within(bad, torch_path, oracle)
    with pytest.raises(AssertionError, match="output: "):
        assert_within(torch_path * 1.02, torch_path, oracle)
    # spread thin: no element is far off, the root mean square is
    noisy = (oracle.sign() * (oracle.abs() + 0.02)).to(torch.bfloat16)
    lone = oracle.to(torch.bfloat16)
    lone[0, 0] += 0.05
    with pytest.raises(AssertionError, match="rms"):
        assert_within(noisy, lone, oracle)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_tolerance_rule_sees_specials(value):
    oracle = torch.ones(4, dtype=torch.float64)
    good = torch.ones(4)
    bad = good.clone()
    bad[2] = value
    with pytest.raises(AssertionError, match=r"at \(2,\)"):
        assert_within(bad, good, oracle)
    oracle[2] = value
    assert_within(bad, bad, oracle)
    with pytest.raises(AssertionError, match=r"at \(2,\)"):
        assert_within(good, bad, oracle)


def test_values_beyond_the_dtype_are_infinities():
    oracle = torch.tensor([1e6], dtype=torch.float64)
    assert_within(torch.tensor([torch.inf]).half(), torch.tensor([torch.inf]).half(), oracle)


def test_assert_same_names_the_first_difference():
    a = torch.zeros(2, 3)
    b = a.clone()
    b[1, 2] = 1
    with pytest.raises(AssertionError, match=r"1 of 6 differ, the first at \(1, 2\)"):
        assert_same(a, b)
    assert_same(-a, a)
    with pytest.raises(AssertionError):
        assert_same(-a, a, signed_zeros=True)
    nan = torch.full((2,), torch.nan)
    assert_same(nan, -nan, signed_zeros=True)
    with pytest.raises(AssertionError, match="dtype"):
        assert_same(a, a.double())


@pytest.mark.parametrize("offset", [-1, 12])
def test_guards_see_a_stray_write(offset):
    with pytest.raises(AssertionError, match="guard bytes"), Poison() as poison:
        t = poison.empty((3, 4), torch.float32)
        assert torch.isnan(t).all()
        t.as_strided((1,), (1,), t.storage_offset() + offset).fill_(0.0)


def test_guards_see_a_write_between_rows():
    with pytest.raises(AssertionError, match="gap between its rows"), Poison() as poison:
        t = poison.empty((3, 4), torch.bfloat16, strides=(6, 1))
        t.fill_(1.0)
        poison.check()
        t.as_strided((1,), (1,), t.storage_offset() + 4).fill_(0.0)


@pytest.mark.parametrize("shape", [(0, 4), (), (2, 0, 3)])
def test_guards_around_empty_and_scalar_tensors(shape):
    with Poison() as poison:
        t = poison.empty(shape, torch.float8_e4m3fn)
        assert t.shape == shape and torch.isnan(t.float()).all()


def test_kept_sees_a_changed_byte():
    x = torch.zeros(2, 3)
    with kept(x=x, nothing=None):
        pass
    with pytest.raises(AssertionError, match=r"x: .* first at \(1, 0\)"), kept(x=x):
        x[1, 0] = 1


@given(r=draw.routings())
def test_routing_draws_are_what_they_say(r):
    ids = r.ids()
    assert ids.shape == (r.T, r.K) and r.weights().shape == (r.T, r.K)
    local = (ids >= r.offset) & (ids < r.offset + r.E)
    if r.pattern == "all skipped":
        assert not local.any()
    elif r.pattern != "skips":
        assert local.all()
    for row in ids:
        live = row[(row >= r.offset) & (row < r.offset + r.E)]
        assert len(live.unique()) == len(live)


@given(seed=draw.seeds())
def test_exact_draws_hold_no_nan(seed):
    for format in ("mxfp4", "nvfp4", "int4", "fp8"):
        assert torch.isfinite(draw.exact_quantized(format, (2, 3, 128), seed).dequantize()).all()
