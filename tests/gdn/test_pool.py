"""Who is written and who is not: padding, unnamed slots, update off, steps beyond T, guards."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import strategies as draw
from tests.close import assert_same
from tests.gdn.cases import Case, cases
from tests.poison import Poison, kept
from tests.strategies import examples

PADDING = (-1, -7, -(2**31), 2**31 - 1)


@settings(max_examples=examples(0.4))
@given(
    case=cases(index=torch.int32),
    extra=st.integers(0, 2),
    update=st.booleans(),
    seed=draw.seeds(),
)
def test_only_what_a_live_row_owns_is_written(target, case, extra, update, seed):
    case = target.fit(case)
    call = target.put(case.call())
    g = draw.generator(seed)
    live = torch.rand(case.B, generator=g) < 0.6
    outside = torch.tensor([*PADDING, case.slots()])
    padded = outside[torch.randint(len(outside), (case.B,), generator=g)].int()
    index = torch.where(live, call["state_indices"].cpu(), padded)
    named = set(index[live].tolist())
    with Poison(target.device) as poison:
        n, m = case.rows()
        HV, slots, steps = case.shape[1], case.slots(), case.T + extra
        state = poison.empty(
            (slots, HV, n, m), case.state, strides=(HV * n * m + 8, n * m, m, 1), name="state"
        )
        for p in named:
            state[p] = call["state"][p]
        before = state.clone()
        snapshots = poison.empty((case.B, steps, HV, n, m), case.state, name="snapshots")
        out = poison.empty(call["v"].shape, case.dtype, name="out")
        plain = {**call, "state": call["state"].clone()}
        want = target.put(case.snapshots())
        want_out = target.decode(**plain, intermediate_states=want)
        call |= {"state": state, "state_indices": index.to(target.device)}
        inputs = {k: x for k, x in call.items() if isinstance(x, torch.Tensor) and k != "state"}
        with kept(**inputs):
            target.decode(**call, out=out, intermediate_states=snapshots, update_state=update)
        for b in range(case.B):
            if live[b]:
                assert_same(out[b], want_out[b])
                assert_same(snapshots[b, : case.T], want[b], "intermediate states")
            else:
                assert (out[b] == 0).all()
                assert torch.isnan(snapshots[b]).all()
            assert torch.isnan(snapshots[b, case.T :]).all()
        if update:
            before[list(named)] = plain["state"][list(named)]
        assert_same(state, before, "state")


@settings(max_examples=examples(0.2))
@given(case=cases(index=None))
def test_without_indices_row_b_has_slot_b(target, case):
    case = target.fit(case)
    call = target.put(case.call())
    other = call | {"state": call["state"].clone()}
    other["state_indices"] = target.put(torch.arange(case.B))
    assert_same(target.decode(**call), target.decode(**other))
    assert_same(call["state"], other["state"], "state")


def test_padding_only_and_empty_pools(target):
    case = Case(B=2, T=2)
    call = target.put(case.call())
    call["state_indices"].fill_(-1)
    with kept(state=call["state"]):
        assert (target.decode(**call) == 0).all()
    none = call | {"state": call["state"][:0]}
    assert (target.decode(**none) == 0).all()
    none["state_indices"].zero_()
    assert (target.decode(**none) == 0).all()


def test_update_off_leaves_every_byte(target):
    case = Case(B=2, T=2, state=torch.bfloat16)
    call = target.put(case.call())
    call["state"].view(torch.int16)[:, :, 0, 0] = 0x7FC1
    with kept(state=call["state"]):
        target.decode(**call, update_state=False)
