"""A slot for the state after every token: intermediate_indices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cutemoe
from cutemoe.gdn import api
from tests import strategies as draw
from tests.close import assert_same
from tests.gdn.cases import NATIVE, Case, cases
from tests.poison import Poison, kept
from tests.strategies import examples

OUTSIDE = (-1, -(2**31), 2**31 - 1)


def targets(case: Case, call: dict, seed: int) -> torch.Tensor:
    """Different free slots for about two tokens of three, and numbers of no slot for the others."""
    g = draw.generator(seed)
    used = set(call["state_indices"].tolist())
    free = [p for p in range(case.slots()) if p not in used]
    order = torch.tensor(free)[torch.randperm(len(free), generator=g)][: case.B * case.T]
    to = order.view(case.B, case.T).int()
    outside = torch.tensor([*OUTSIDE, case.slots()]).int()
    pick = outside[torch.randint(len(outside), to.shape, generator=g)]
    return torch.where(torch.rand(to.shape, generator=g) < 0.7, to, pick)


@settings(max_examples=examples(0.4))
@given(
    case=cases(index=torch.int32, spare=7),
    update=st.booleans(),
    kind=st.sampled_from((torch.int32, torch.int64)),
    seed=draw.seeds(),
)
def test_states_go_to_their_slots_and_nowhere_else(target, case, update, kind, seed):
    case = target.fit(case)
    call = target.put(case.call())
    to = targets(case, call, seed)
    live = torch.rand(case.B, generator=draw.generator(seed + 1)) < 0.7
    call["state_indices"] = torch.where(live, call["state_indices"].cpu(), -1).to(target.device)
    states = target.put(case.snapshots())
    plain = call | {"state": call["state"].clone()}
    want_out = target.decode(**plain, intermediate_states=states, update_state=update)
    want = plain["state"]
    for b in range(case.B):
        for t in range(case.T):
            if live[b] and 0 <= to[b, t] < case.slots():
                want[int(to[b, t])] = states[b, t]
    with Poison(target.device) as poison:
        n, m = case.rows()
        HV, slots = case.shape[1], case.slots()
        strides = (HV * n * m + 16, n * m, m, 1)
        state = poison.empty((slots, HV, n, m), case.state, strides=strides, name="state")
        state.copy_(call["state"])
        out = poison.empty(call["v"].shape, case.dtype, name="out")
        indices = target.put(to.to(kind))
        with kept(indices=indices):
            target.decode(
                **call | {"state": state}, out=out, intermediate_indices=indices,
                update_state=update,
            )  # fmt: skip
        assert_same(out, want_out)
        assert_same(state, want, "state")


def test_a_sequence_may_store_into_its_own_slot(target):
    """As vLLM does where nothing is drafted: the state after the last token replaces the first."""
    case = Case(B=2, T=2, spare=4)
    call = target.put(case.call())
    own = call["state_indices"]
    free = [p for p in range(6) if p not in own.tolist()]
    to = torch.stack((torch.tensor(free[:2], device=own.device).int(), own), 1)
    plain = call | {"state": call["state"].clone()}
    out = target.decode(**call, intermediate_indices=to, update_state=False)
    assert_same(out, target.decode(**plain))
    assert_same(call["state"][own.long()], plain["state"][own.long()], "state")


@pytest.mark.parametrize("update", [True, False])
def test_opcheck(update):
    case = Case(B=2, T=2, spare=4)
    call = case.call()
    args = api._decode_call(
        **call, intermediate_indices=targets(case, call, 3), update_state=update
    )
    torch.library.opcheck(torch.ops.cutemoe.gdn_decode.default, args)


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(2, 1, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(2, 2, dtype=torch.int16),
        torch.zeros(2, 2),
        [[0, 1], [2, 3]],
    ],
    ids=str,
)
def test_bad_indices_are_named(bad):
    call = Case(B=2, T=2).call()
    with (
        kept(state=call["state"]),
        pytest.raises(cutemoe.InvalidCall, match=r"^intermediate_indices: "),
    ):
        cutemoe.gdn_decode(**call, intermediate_indices=bad)


def test_not_beside_intermediate_states():
    case = Case(B=2, T=2)
    call, to = case.call(), torch.full((2, 2), -1)
    with pytest.raises(cutemoe.InvalidCall, match="None with intermediate_states"):
        cutemoe.gdn_decode(**call, intermediate_indices=to, intermediate_states=case.snapshots())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", NATIVE, ids=str)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["vk", "kv"])
@pytest.mark.parametrize("T", [1, 3, 8, 11])
def test_head_sizes_of_real_models(target, shape, state, layout, T):
    """Every token's slot holds what intermediate_states does, the slots of nobody what they did."""
    if target.device == "cpu":
        pytest.skip("minutes in the interpreter")
    case = Case(3, T, shape, torch.bfloat16, state, layout, spare=3 * T + 2)
    call = target.put(case.call())
    to = targets(case, call, T)
    want, states = call["state"].clone(), target.put(case.snapshots())
    out = target.decode(
        **call | {"state": want.clone()}, intermediate_states=states, update_state=False
    )
    for b in range(3):
        for t in range(T):
            if 0 <= to[b, t] < case.slots():
                want[int(to[b, t])] = states[b, t]
    got = target.decode(**call, intermediate_indices=target.put(to.long()), update_state=False)
    assert_same(got, out)
    assert_same(call["state"], want, "state")
