"""The oracles agree with the reference back ends, and the rule tells right from wrong."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cutemoe
from cutemoe.commands import oracle
from cutemoe.commands.oracle import Layer, Steps, Verdict

H, I, E, K, T = 64, 32, 4, 2, 5  # noqa: E741

CONFIGS = {
    "mxfp4": ("mxfp4", "bf16"),
    "nvfp4": ("nvfp4", "bf16"),
    "int4": ("int4", "bf16"),
    "dense": (None, "bf16"),
    "w4a8": ("int4", "fp8"),
    "w4a4": ("nvfp4", "nvfp4"),
    "mxfp4 w4a4": ("mxfp4", "mxfp4"),
}


def weight(shape: tuple[int, ...], format: str | None, g: torch.Generator) -> oracle.Weight:
    w = torch.randn(shape, generator=g) * shape[-1] ** -0.5
    if format is None:
        return w.to(torch.bfloat16)
    return cutemoe.quantize(w, format, **({"group_size": 32} if format == "int4" else {}))


@pytest.mark.parametrize("gate_up", ["gate_up", "up_gate", "interleaved"])
@pytest.mark.parametrize("name", CONFIGS)
@given(seed=st.integers(0, 2**31 - 1))
def test_the_reference_layer_is_within_the_bound(name: str, gate_up: str, seed: int) -> None:
    format, activations = CONFIGS[name]
    g = torch.Generator().manual_seed(seed)
    w13, w2 = weight((E, 2 * I, H), format, g), weight((E, H, I), format, g)
    b13, b2 = torch.randn(E, 2 * I, generator=g), torch.randn(E, H, generator=g)
    swiglu = (1.702, 1.0, 2.0)
    layer = Layer(w13, w2, b13, b2, gate_up, activations, swiglu)
    moe = cutemoe.prepare_moe(w13, w2, b13, b2, activations=activations, gate_up=gate_up)
    x = torch.randn(T, H, generator=g).to(torch.bfloat16)
    ids, weights = cutemoe.route(torch.randn(T, E, generator=g), K)
    y = cutemoe.fused_moe(x, moe, ids, weights, activation=cutemoe.SwiGLU(*swiglu))
    verdict = oracle.judge(y, *oracle.moe(x, layer, ids, weights))
    assert verdict.ok, verdict
    wrong = cutemoe.fused_moe(x, moe, ids, weights, activation=cutemoe.SwiGLU(1.702, 0.5, 2.0))
    assert not oracle.judge(wrong, *oracle.moe(x, layer, ids, weights)).ok


def steps(tokens: int, g: torch.Generator) -> tuple[Steps, torch.Tensor]:
    # the worst of many elements: that of a few is another one in every order of summation
    b, hq, hv, d = 24, 2, 4, 64

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(torch.bfloat16)

    q, k, v = randn(b, tokens, hq, d), randn(b, tokens, hq, d), randn(b, tokens, hv, d)
    a, beta = randn(b, tokens, hv), randn(b, tokens, hv)
    a_log, dt_bias = torch.randn(hv, generator=g), torch.randn(hv, generator=g)
    return Steps(q, k, v, a, beta, a_log, dt_bias), torch.randn(b, hv, d, d, generator=g)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tokens", (1, 4))
def test_the_reference_steps_are_within_the_bound(tokens: int, seed: int) -> None:
    s, state = steps(tokens, torch.Generator().manual_seed(seed))
    pool = state.clone()
    every = torch.empty(state.shape[0], tokens, *state.shape[1:])
    gates: dict[str, Any] = {"a": s.a, "b": s.b, "A_log": s.A_log, "dt_bias": s.dt_bias}
    out = cutemoe.gdn_decode(s.q, s.k, s.v, state=pool, intermediate_states=every, **gates)
    o, states = oracle.gdn(s, state, torch.float64)
    path, rounded = oracle.gdn(s, state, torch.float32)
    assert oracle.judge(out, o, path).ok
    assert oracle.judge(every, states, rounded).ok
    assert oracle.judge(pool, states[:, -1], rounded[:, -1]).ok
    assert not oracle.judge(pool, states[:, -1] * 1.001, rounded[:, -1] * 1.001).ok


@given(seed=st.integers(0, 2**31 - 1), dtype=st.sampled_from([torch.bfloat16, torch.float32]))
def test_one_rounding_is_ok_and_three_units_are_not(seed: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    exact = torch.randn(64, generator=g, dtype=torch.float64)
    rounded = exact.to(dtype)
    assert oracle.judge(rounded, exact, exact.to(dtype)).ok
    off = rounded.clone()
    # 2 x half a unit of the largest value, and a unit of its own, are allowed
    off[0] += 4 * torch.finfo(dtype).eps * 2.0 ** math.frexp(float(exact.abs().max()))[1]
    assert not oracle.judge(off, exact, exact.to(dtype)).ok


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_never_ok(value: float) -> None:
    exact = torch.ones(4, dtype=torch.float64)
    out = exact.float()
    out[2] = value
    verdict = oracle.judge(out, exact, exact.float())
    assert not verdict.ok
    assert not oracle.worst([Verdict(0.0, 1.0), verdict]).ok


def test_zero_against_zero_is_ok() -> None:
    zero = torch.zeros(4, dtype=torch.float64)
    assert oracle.judge(zero.float(), zero, zero.float()).ok
