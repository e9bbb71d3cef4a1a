"""What must hold whatever the kernel. Inputs are exact, so that equality is right."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cutemoe
from tests import strategies as draw
from tests.close import assert_same
from tests.gemm.cases import call, exact_x, group_sizes, offsets_of, out_dtype
from tests.moe.cases import exact_weight
from tests.poison import Poison, kept

KINDS = [("mxfp4", "bf16"), ("int4", "fp8"), ("int4", "bf16")]
SHARE = 0.3
N, K = 48, 64


def inputs(format: str, kind: str, sizes: list[int], seed: int, tail: int = 0):
    w = exact_weight(format, (len(sizes), N, K), seed)
    return exact_x(sum(sizes) + tail, K, kind, seed + 5), w, offsets_of(sizes)


@pytest.mark.parametrize(("format", "kind"), KINDS)
@settings(max_examples=draw.examples(SHARE))
@given(sizes=group_sizes(), seed=draw.seeds())
def test_groups_do_not_see_each_other(target, format, kind, sizes, seed):
    x, w, offsets = inputs(format, kind, sizes, seed)
    whole = call(target, x, w, offsets)
    for g, rows in enumerate(sizes):
        part = slice(int(offsets[g]), int(offsets[g + 1]))
        alone = call(target, x[part], w[g : g + 1], offsets_of([rows]))
        assert_same(whole[part], alone)


@pytest.mark.parametrize(("format", "kind"), KINDS)
@settings(max_examples=draw.examples(SHARE))
@given(sizes=group_sizes(), seed=draw.seeds(), tail=st.integers(1, 9))
def test_rows_of_no_group_are_zero(target, format, kind, sizes, seed, tail):
    x, w, offsets = inputs(format, kind, sizes, seed, tail)
    x[-tail:] = torch.tensor(torch.nan)
    got = call(target, x, w, offsets)
    assert_same(got[-tail:], torch.zeros(tail, N, dtype=got.dtype))
    assert_same(got[:-tail], call(target, x[:-tail], w, offsets))


@pytest.mark.parametrize(("format", "kind"), KINDS)
@settings(max_examples=draw.examples(SHARE))
@given(sizes=group_sizes(), seed=draw.seeds())
def test_a_broken_row_breaks_only_itself(target, format, kind, sizes, seed):
    x, w, offsets = inputs(format, kind, sizes, seed)
    if not len(x):
        return
    want = call(target, x, w, offsets)
    row = seed % len(x)
    x[row, seed % K] = torch.tensor(torch.nan)
    got = call(target, x, w, offsets)
    others = torch.arange(len(x)) != row
    assert_same(got[others], want[others])
    assert got[row].isnan().all()


@pytest.mark.parametrize(
    "offsets",
    [[0, 100, 200], [0, 3, 2**31 - 1], [0, 2**31 - 1, 2**31 - 1], [0, -5, 8], [-(2**31), 4, 8]],
    ids=str,
)
def test_offsets_outside_the_rows_are_clamped(target, offsets):
    x, w, _ = inputs("mxfp4", "bf16", [4, 4], 1)
    clamped = torch.tensor(offsets).clamp(0, 8).int()
    want = call(target, x, w, clamped)
    assert_same(call(target, x, w, torch.tensor(offsets).int()), want)


@pytest.mark.parametrize("sizes", [[0], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("tail", [0, 3])
def test_no_rows(target, sizes, tail):
    x, w, offsets = inputs("mxfp4", "bf16", sizes, 1, tail)
    got = call(target, x, w, offsets)
    assert_same(got, torch.zeros(tail, N, dtype=out_dtype(x)))


@pytest.mark.parametrize(("format", "kind"), KINDS)
def test_strided_rows_and_guards(target, format, kind):
    x, w, offsets = inputs(format, kind, [5, 0, 20, 3], 2, 1)
    want = call(target, x, w, offsets)
    w = w.to(target.device)
    with Poison(target.device) as poison:
        wide = poison.of(target.put(x), strides=(K + 16, 1))
        out = poison.empty((len(x), N), want.dtype, strides=(N + 8, 1))
        offsets = target.put(offsets)
        with kept(x=wide, data=w.data, scale=w.scale, offsets=offsets):
            got = cutemoe.grouped_gemm(wide, w, offsets, out=out, backend=target.backend)
        assert got is out
        assert_same(out, want)
