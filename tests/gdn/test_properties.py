"""What must hold bit for bit between calls: tokens, sequences, slots, heads, views, indices."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import strategies as draw
from tests.close import assert_same, assert_within
from tests.gdn.cases import Case, cases, live_slots, oracle, torch_path, vk
from tests.strategies import examples

TOKENS = ("q", "k", "v", "a", "b", "g", "beta")
F32 = {"state": torch.float32}


def tokens(call: dict, part: slice) -> dict:
    """The call with some of its tokens."""
    return {k: x[:, part] if k in TOKENS else x for k, x in call.items()}


def fresh(call: dict) -> dict:
    """The call with a pool of its own."""
    return call | {"state": call["state"].clone()}


@settings(max_examples=examples(0.25))
@given(case=cases(**F32), cut=st.integers(0, 3))
def test_a_call_is_its_tokens_one_by_one_or_in_two_calls(target, case, cut):
    """CuTe solves for the tokens of a call at once: there every way keeps the bound instead."""
    case = target.fit(case)
    exact = target.backend != "cute"
    want, peer = oracle(case.call()), torch_path(case.call(), target.device)
    call = target.put(case.call())
    whole = fresh(call)
    out = target.decode(**whole)
    for parts in ([slice(t, t + 1) for t in range(case.T)], [slice(0, cut), slice(cut, None)]):
        other = fresh(call)
        got = [target.decode(**tokens(other, part)) for part in parts]
        if got and exact:
            assert_same(torch.cat(got, 1), out)
        elif got:
            assert_within(torch.cat(got, 1), peer.out.to(case.dtype), want.out)
        if exact or case.T == 0:
            assert_same(other["state"], whole["state"], "state")
        else:
            final = vk(other["state"][live_slots(call)], case)
            assert_within(final, peer.states[:, -1], want.states[:, -1], "state")


@settings(max_examples=examples(0.25))
@given(case=cases(), t=st.integers(0, 2))
def test_a_snapshot_is_the_final_state_of_its_prefix(target, case, t):
    """In CuTe a final state without snapshots takes its tokens at once: each keeps the bound."""
    case = target.fit(case)
    call = target.put(case.call())
    snapshots = target.put(case.snapshots())
    target.decode(**fresh(call), intermediate_states=snapshots)
    if t < case.T:
        prefix = fresh(tokens(call, slice(0, t + 1)))
        target.decode(**prefix)
        final = prefix["state"][live_slots(call)]
        if target.backend != "cute":
            assert_same(final, snapshots[:, t], "state")
            return
        want, peer = (
            x.states[:, t] for x in (oracle(case.call()), torch_path(case.call(), "cuda"))
        )
        for x in (final, snapshots[:, t]):
            assert_within(vk(x, case), peer.to(case.state), want, "state")


@settings(max_examples=examples(0.25))
@given(case=cases(index=torch.int64), seed=draw.seeds())
def test_sequences_and_slots_may_be_permuted(target, case, seed):
    case = target.fit(case)
    call = case.call()
    rows = torch.randperm(case.B, generator=draw.generator(seed))
    slots = torch.randperm(case.slots(), generator=draw.generator(seed + 1))
    other = {k: x[rows] if k in (*TOKENS, "state_indices") else x for k, x in call.items()}
    other["state_indices"] = slots.argsort()[other["state_indices"]]
    other["state"] = call["state"][slots].clone()
    call, other = target.put(call), target.put(other)
    assert_same(target.decode(**other), target.decode(**call)[rows])
    assert_same(other["state"], call["state"][slots], "state")


@settings(max_examples=examples(0.25))
@given(case=cases(B=3, T=2), seed=draw.seeds())
def test_a_row_has_the_same_bits_in_any_batch(target, case, seed):
    case = target.fit(case)
    call = target.put(case.call())
    call.setdefault("state_indices", target.put(torch.arange(3)))
    out = target.decode(**fresh(call))
    b = seed % 3
    alone = {k: x[b : b + 1] if k in (*TOKENS, "state_indices") else x for k, x in call.items()}
    assert_same(target.decode(**fresh(alone)), out[b : b + 1])


@settings(max_examples=examples(0.25))
@given(case=cases(B=2, T=2))
def test_a_head_of_v_uses_its_share_of_q_and_k(target, case):
    case = target.fit(case)
    call = target.put(case.call())
    group = case.shape[1] // case.shape[0]
    wide = fresh(call) | {n: call[n].repeat_interleave(group, 2) for n in ("q", "k")}
    assert_same(target.decode(**wide), target.decode(**call))
    assert_same(wide["state"], call["state"], "state")


@settings(max_examples=examples(0.25))
@given(case=cases(B=2, T=2), pad=st.sampled_from((8, 16)))
def test_views_are_used_as_they_are(target, case, pad):
    """q, k, v cut from one tensor; a pool with gaps, heads outermost; out inside a larger one."""
    case = target.fit(case)
    if target.backend == "triton":
        pad = 16  # rows off multiples of 16 elements are summed in another way, see constants()
    call = target.put(case.call())
    HQ, HV, DK, DV = case.shape
    B, T, P = case.B, case.T, case.slots()
    sizes = {"q": HQ * DK, "k": HQ * DK, "v": HV * DV}
    packed = torch.cat([call[n].flatten(2) for n in sizes] + [call["v"].flatten(2)], -1)
    views, at = {}, 0
    for n, size in sizes.items():
        views[n] = packed[..., at : at + size].view(call[n].shape)
        at += size
    n, m = case.rows()
    pool = torch.full((HV, P + 1, n, m + pad), torch.nan, dtype=case.state, device=target.device)
    views["state"] = pool.permute(1, 0, 2, 3)[1:, :, :, :m]
    views["state"].copy_(call["state"])
    big = torch.full((B, HV, T + 1, DV), torch.nan, dtype=case.dtype, device=target.device)
    out = big.permute(0, 2, 1, 3)[:, :T]
    want = target.decode(**call)
    got = target.decode(**(call | views), out=out)
    assert got is out
    assert_same(out, want)
    assert_same(views["state"], call["state"], "state")
    assert torch.isnan(pool[:, 0]).all() and torch.isnan(pool[..., m:]).all()
    assert torch.isnan(big[:, :, T]).all()


@settings(max_examples=examples(0.2))
@given(case=cases(raw=True))
def test_strided_gates_and_parameters(target, case):
    case = target.fit(case)
    call = target.put(case.call())
    other = fresh(call)
    for name in ("a", "b"):
        other[name] = call[name].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for name in ("A_log", "dt_bias"):
        other[name] = torch.stack([call[name].double()] * 3, -1)[:, 1]
    assert_same(target.decode(**other), target.decode(**call))
    assert_same(other["state"], call["state"], "state")


@settings(max_examples=examples(0.2))
@given(case=cases(index=torch.int32))
def test_int64_indices_name_the_same_slots(target, case):
    case = target.fit(case)
    call = target.put(case.call())
    other = fresh(call) | {"state_indices": call["state_indices"].repeat(2)[: case.B].long()}
    assert_same(target.decode(**other), target.decode(**call))
    assert_same(other["state"], call["state"], "state")


@settings(max_examples=examples(0.2))
@given(case=cases(raw=True, B=1, T=2), seed=draw.seeds())
def test_extreme_gates_stay_finite(target, case, seed):
    case = target.fit(case)
    call = case.call()
    g = draw.generator(seed)
    for name, extremes in (
        ("a", (-3e38, -1e4, 0.0, 30.0, 1e4, 3e38)),
        ("b", (-3e38, -104.0, 18.0, 3e38)),
        ("A_log", (-torch.inf, -1e4, 0.0, 2.8, 88.0, 1e4)),
        ("dt_bias", (-3e38, 0.0, 1e4)),
    ):
        pick = torch.randint(len(extremes), call[name].shape, generator=g)
        call[name] = torch.tensor(extremes)[pick].bfloat16()
    call = target.put(call)
    snapshots = target.put(case.snapshots())
    out = target.decode(**call, intermediate_states=snapshots)
    for x in (out, call["state"], snapshots):
        assert torch.isfinite(x).all()


def test_no_decay_at_all(target):
    """A_log = -inf: the same as a log decay of 0, whatever a is."""
    case = Case(B=1, T=3)
    call = target.put(case.call())
    call["A_log"].fill_(-torch.inf)
    call["a"][0, 1] = 3e38
    given_ = {k: x for k, x in call.items() if k not in ("a", "b", "A_log", "dt_bias")}
    given_ |= {"g": torch.zeros_like(call["a"]), "beta": torch.ones_like(call["b"])}
    call["b"].fill_(30.0)
    given_["state"] = call["state"].clone()
    assert_same(target.decode(**call), target.decode(**given_))
    assert_same(call["state"], given_["state"], "state")
