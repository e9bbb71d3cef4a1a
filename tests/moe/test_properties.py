"""What must hold whatever the kernel: order of tokens, names of experts, splits, skips, NaN.

Layers are exact, so that equality is right for every back end, tile and batch size.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cutemoe
from tests import strategies as draw
from tests.close import assert_same, ulp
from tests.moe.cases import SATURATED, Layer, Target, call, exact_layer, exact_x
from tests.poison import kept

FORMATS = [("mxfp4", "bf16"), ("nvfp4", "nvfp4"), ("int4", "fp8"), ("mxfp4", "mxfp4")]
pytestmark = pytest.mark.parametrize(("format", "activations"), FORMATS)
SHARE = 0.12


def run(
    target: Target, layer: Layer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    with kept(x=x, ids=ids, weights=weights):
        return call(target, layer, x, ids, weights, activation=SATURATED)


def drawn(
    r: draw.Routing, format: str, activations: str
) -> tuple[Layer, torch.Tensor, torch.Tensor, torch.Tensor]:
    r = replace(r, offset=0)
    layer = exact_layer(format, activations, E=r.E, seed=r.seed % 997)
    return layer, exact_x(r.T, layer, r.seed), r.ids(), r.weights(exact=True)


@settings(max_examples=draw.examples(SHARE))
@given(r=draw.routings(most_tokens=20, most_experts=6), seed=draw.seeds())
def test_permuted_tokens_give_permuted_rows(target, format, activations, r, seed):
    layer, x, ids, weights = drawn(r, format, activations)
    p = torch.randperm(r.T, generator=draw.generator(seed))
    want = run(target, layer, x, ids, weights)[p]
    assert_same(run(target, layer, x[p], ids[p], weights[p]), want)


@settings(max_examples=draw.examples(SHARE))
@given(r=draw.routings(most_tokens=20, most_experts=6), seed=draw.seeds())
def test_names_of_experts_do_not_matter(target, format, activations, r, seed):
    layer, x, ids, weights = drawn(r, format, activations)
    p = torch.randperm(r.E, generator=draw.generator(seed))
    inputs = None if layer.input_scale is None else tuple(s[p] for s in layer.input_scale)
    moved = replace(
        layer,
        w13=layer.w13[p],
        w2=layer.w2[p],
        b13=layer.b13[p],
        b2=layer.b2[p],
        input_scale=inputs,
    )
    local = (ids >= 0) & (ids < r.E)
    renamed = torch.where(local, p.argsort()[torch.where(local, ids, 0).long()], ids.long()).int()
    want = run(target, layer, x, ids, weights)
    assert_same(run(target, moved, x, renamed, weights), want)


@settings(max_examples=draw.examples(SHARE))
@given(r=draw.routings(most_tokens=20, most_experts=6), cut=st.floats(0, 1))
def test_a_split_batch_gives_the_same_rows(target, format, activations, r, cut):
    layer, x, ids, weights = drawn(r, format, activations)
    at = round(cut * r.T)
    parts = [slice(0, at), slice(at, r.T)]
    halves = [run(target, layer, x[s], ids[s], weights[s]) for s in parts]
    assert_same(torch.cat(halves), run(target, layer, x, ids, weights))


@settings(max_examples=draw.examples(SHARE))
@given(r=draw.routings(most_tokens=20, most_experts=6), seed=draw.seeds())
def test_parts_of_the_experts_add_up(target, format, activations, r, seed):
    """Expert parallelism: each half of the experts skips the ids of the other."""
    layer, x, ids, weights = drawn(r, format, activations)
    whole = run(target, layer, x, ids, weights).double()
    at = r.E // 2
    total, halves_of_ulps = torch.zeros_like(whole), ulp(whole, x.dtype) / 2
    for part in (slice(0, at), slice(at, r.E)):
        if part.start == part.stop:
            continue
        inputs = None if layer.input_scale is None else tuple(s[part] for s in layer.input_scale)
        local = replace(
            layer,
            w13=layer.w13[part],
            w2=layer.w2[part],
            b13=layer.b13[part],
            b2=layer.b2[part],
            input_scale=inputs,
        )
        y = call(target, local, x, ids, weights, activation=SATURATED, expert_offset=part.start)
        total += y.double()
        halves_of_ulps += ulp(y.double(), x.dtype) / 2
    # the sums are exact; whole and parts each round once
    assert ((total - whole).abs() <= halves_of_ulps).all()


@settings(max_examples=draw.examples(SHARE))
@given(r=draw.routings(most_tokens=20, most_experts=6), seed=draw.seeds())
def test_skipped_slots_are_as_if_absent(target, format, activations, r, seed):
    layer, x, ids, weights = drawn(r, format, activations)
    g = draw.generator(seed)
    skip = torch.rand(ids.shape, generator=g) < 0.5
    outside = torch.tensor([-1, r.E, 2**31 - 1, -(2**31), r.E + 7, -(2**63), 2**63 - 1, 2**32])
    pick = outside[torch.randint(0, len(outside), ids.shape, generator=g)]
    skipped = torch.where(skip, pick, ids.long())
    poisoned = torch.where(skip, torch.nan, weights)
    absent = torch.where(skip, -1, ids)
    want = run(target, layer, x, absent, torch.where(skip, 0.0, weights))
    got = run(target, layer, x, skipped, poisoned)
    assert_same(got, want)
    dead = ~((absent >= 0) & (absent < r.E)).any(1)
    assert not got[dead].any()


@settings(max_examples=draw.examples(SHARE))
@given(r=draw.routings(most_tokens=20, most_experts=6), seed=draw.seeds())
def test_a_zero_weight_adds_nothing(target, format, activations, r, seed):
    layer, x, ids, weights = drawn(r, format, activations)
    off = torch.rand(ids.shape, generator=draw.generator(seed)) < 0.5
    want = run(target, layer, x, torch.where(off, -1, ids), weights)
    assert_same(run(target, layer, x, ids, torch.where(off, 0.0, weights)), want)


@settings(max_examples=draw.examples(SHARE))
@given(
    r=draw.routings(most_tokens=20, most_experts=6),
    seed=draw.seeds(),
    value=st.sampled_from([torch.nan, torch.inf]),
)
def test_a_broken_token_breaks_its_own_row_only(target, format, activations, r, seed, value):
    layer, x, ids, weights = drawn(r, format, activations)
    if r.T == 0:
        return
    t = seed % r.T
    want = run(target, layer, x, ids, weights)
    x[t, seed % layer.hidden] = value
    got = run(target, layer, x, ids, weights)
    others = torch.arange(r.T) != t
    assert_same(got[others], want[others])
    live = ((ids[t] >= 0) & (ids[t] < r.E)).any()
    assert not live or not torch.isfinite(got[t]).all()


def test_no_tokens_and_no_live_slots(target, format, activations):
    layer = exact_layer(format, activations)
    empty = run(target, layer, exact_x(0, layer, 1), torch.empty(0, 2).int(), torch.empty(0, 2))
    assert empty.shape == (0, layer.hidden)
    ids = torch.tensor([[-1, 5], [2**31 - 1, 77]], dtype=torch.int32)
    y = run(target, layer, exact_x(2, layer, 1), ids, torch.full((2, 2), torch.nan))
    assert_same(y, torch.zeros_like(y), signed_zeros=True)


@pytest.mark.parametrize("order", ["up_gate", "interleaved"])
def test_row_orders_agree(target, format, activations, order):
    """The same layer with its rows moved, flag and rows together."""
    layer = exact_layer(format, activations, gate_up="gate_up")
    n = layer.intermediate
    rows = torch.arange(2 * n)
    p = rows.roll(n) if order == "up_gate" else rows.view(2, n).T.flatten()
    w = layer.w13
    over = w.global_scale
    w13 = cutemoe.QuantizedTensor(w.data[:, p], w.scale[:, p], over, format=w.format)
    moved = replace(layer, w13=w13, b13=layer.b13[:, p], gate_up=order)
    r = draw.Routing(T=8, K=2, E=5, offset=0, pattern="uniform", seed=3)
    x, ids, weights = exact_x(8, layer, 4), r.ids(), r.weights(exact=True)
    assert_same(run(target, moved, x, ids, weights), run(target, layer, x, ids, weights))
