"""Random calls against a float64 token loop, by the one tolerance rule."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.close import assert_within
from tests.gdn.cases import NATIVE, Case, cases, live_slots, oracle, torch_path, vk
from tests.strategies import examples


def check(target, case: Case) -> None:
    case = target.fit(case)
    call = case.call()
    want, peer = oracle(call), torch_path(call, target.device)
    call = target.put(call)
    snapshots = target.put(case.snapshots())
    before = call["state"].clone()
    out = target.decode(**call, intermediate_states=snapshots)
    assert out.dtype == case.dtype and out.shape == call["v"].shape
    assert_within(out, peer.out.to(case.dtype), want.out)
    states = vk(snapshots, case)
    assert_within(states, peer.states.to(case.state), want.states, "intermediate states")
    final = before
    if case.T > 0:
        final[live_slots(call)] = snapshots[:, -1]
    assert torch.equal(call["state"], final)


@settings(max_examples=examples(0.4))
@given(case=cases())
def test_a_call_is_as_near_to_float64_as_torch(target, case):
    check(target, case)


@pytest.mark.parametrize("shape", NATIVE, ids=str)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=examples(0.1))
@given(
    T=st.integers(1, 9), dtype=st.sampled_from((torch.bfloat16, torch.float32)), raw=st.booleans()
)
def test_head_sizes_of_real_models(target, shape, state, T, dtype, raw):
    if target.device == "cpu":
        T = min(T, 2)
    check(target, Case(B=1, T=T, shape=shape, state=state, dtype=dtype, raw=raw, spare=0))


@pytest.mark.parametrize("layout", ["vk", "kv"])
@pytest.mark.parametrize("T", [8, 9, 17])
def test_many_tokens(target, layout, T):
    check(target, Case(B=1, T=T, shape=(1, 1, 8, 4), layout=layout))


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["vk", "kv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 16, 128, 128), (2, 8, 64, 128)], ids=str)
def test_the_worst_of_many_elements(target, shape, dtype, layout):
    """A call large enough to show the tail of the errors, without norms that keep sums small."""
    if target.device == "cpu":
        pytest.skip("minutes in the interpreter")
    check(target, Case(B=8, T=8, shape=shape, dtype=dtype, layout=layout, l2norm=False))
