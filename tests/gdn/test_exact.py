"""Inputs for which every number is exact: any order of any correct computation has these bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import strategies as draw
from tests.close import assert_same
from tests.gdn.cases import NATIVE, SHAPES, Case, oracle, vk
from tests.strategies import examples

# b = 18 gives beta = 1 and b = -104 gives 0; a = -20 gives g = 1 and a = 400 gives 0 (A_log = 0)
BETA, DECAY = (18.0, -104.0), (-20.0, 400.0)


def exact_call(case: Case) -> dict:
    """Signed powers of two for q and k (few of them not 0), small integers, gates 0 and 1."""
    call = case.call()
    g = draw.generator(case.seed)

    def choice(shape, values):
        return torch.tensor(values)[torch.randint(len(values), shape, generator=g)]

    for name in ("q", "k"):
        shape = call[name].shape
        sparse = torch.rand(shape, generator=g) < 4 / shape[-1]
        call[name] = (choice(shape, (-1.0, 1.0, 0.5, 2.0)) * sparse).to(case.dtype)
    for name in ("v", "state"):
        call[name] = torch.randint(-3, 4, call[name].shape, generator=g).to(call[name].dtype)
    heads = call["v"].shape[:3]
    if case.raw:
        call["a"] = choice(heads, DECAY).to(case.dtype)
        call["b"] = choice(heads, BETA).to(case.dtype)
        call["A_log"], call["dt_bias"] = torch.zeros(heads[2]), torch.zeros(heads[2])
    else:
        call["g"], call["beta"] = choice(heads, (0.0, -torch.inf)), choice(heads, (0.0, 1.0))
    return call | {"scale": 0.5, "qk_l2norm": False}


def check(target, case: Case) -> None:
    case = target.fit(case)
    call = exact_call(case)
    plain = dict(call)
    if case.raw:
        for name in ("A_log", "dt_bias"):
            del plain[name]
        plain["g"] = torch.where(plain.pop("a") > 0, -torch.inf, 0.0).float()
        plain["beta"] = (plain.pop("b") > 0).float()
    want = oracle(plain)
    assert (want.states.float().double() == want.states).all(), "not exact"
    call = target.put(call)
    snapshots = target.put(case.snapshots())
    out = target.decode(**call, intermediate_states=snapshots)
    assert_same(vk(snapshots, case), want.states.to(case.state), "intermediate states")
    assert_same(out, want.out.to(case.dtype))


@settings(max_examples=examples(0.4))
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 3),
    shape=st.sampled_from(SHAPES),
    dtype=st.sampled_from((torch.bfloat16, torch.float32)),
    layout=st.sampled_from(("vk", "kv")),
    raw=st.booleans(),
    seed=draw.seeds(),
)
def test_every_bit(target, B, T, shape, dtype, layout, raw, seed):
    check(target, Case(B, T, shape, dtype, layout=layout, raw=raw, seed=seed))


@pytest.mark.parametrize("shape", NATIVE, ids=str)
def test_every_bit_at_the_head_sizes_of_real_models(target, shape):
    for seed in range(1 if target.device == "cpu" else 5):
        check(target, Case(1, 2, shape, torch.bfloat16, seed=seed))


def test_an_orthonormal_key_stores_its_value(target):
    """beta = 1, g = 1, k = e_t: S k_t = v_t, and with g = 0 nothing else is left."""
    case = Case(B=1, T=3, shape=(1, 1, 8, 8), raw=False, l2norm=False, index=None, spare=0)
    call = case.call()
    call |= {n: draw.integers(tuple(call[n].shape), 1, 8, torch.float32) for n in ("v", "state")}
    call["k"] = torch.eye(8)[:3].view(1, 3, 1, 8)
    call["beta"] = torch.ones(1, 3, 1)
    for log_g, kept in ((0.0, 1.0), (-torch.inf, 0.0)):
        state = target.put(call["state"].clone())
        target.decode(**target.put(call | {"g": torch.full((1, 3, 1), log_g)}) | {"state": state})
        S, v = state[0, 0].cpu(), call["v"][0, :, 0]
        assert_same(S[:, 2], v[2])
        assert_same(S[:, 1], v[1] * kept)
        assert_same(S[:, 3:], call["state"][0, 0][:, 3:] * kept)
