"""Where numbers, steps and addresses get large: gates, a thousand windows, far slots, streams."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import cutemoe
from cutemoe.gdn import plan
from tests import strategies as draw
from tests.close import assert_same, assert_within
from tests.gdn.cases import Case, Target, gates_of, oracle, vk

CARD = [Target(b.name, "cuda") for b in plan.DECODE]


@pytest.fixture(params=CARD, ids=str)
def card(request: pytest.FixtureRequest) -> Target:
    """Every back end on the GPU."""
    request.param.available()
    return request.param


# A_log, a, b: no decay at all, the strongest decay of a real model, beta 0 and beta 1
GATES = {
    "no decay": (-math.inf, 0.5, 0.5),
    "strong decay": (math.log(16.0), 30.0, 0.5),
    "beta 0": (0.5, 0.5, -104.0),
    "beta 1": (0.5, 0.5, 104.0),
    "all forgotten": (math.log(16.0), 30.0, 104.0),
    "nothing happens": (-math.inf, 30.0, -104.0),
}


def extreme_call(case: Case, gates: str) -> dict[str, Any]:
    """Every second token and the last head have ordinary gates."""
    call = case.call()
    A_log, a, b = GATES[gates]
    call["A_log"][0] = A_log
    call["a"][:, ::2, 0], call["b"][:, ::2, 0] = a, b
    return call


@pytest.mark.parametrize("layout", ["vk", "kv"])
@pytest.mark.parametrize("gates", GATES)
def test_extreme_gates_keep_the_bound(target: Target, gates: str, layout: str) -> None:
    case = Case(2, 3, (1, 2, 64, 64), torch.bfloat16, layout=layout)
    if target.device == "cpu" and target.backend != "reference":
        case = case.with_(B=1, shape=(1, 2, 16, 16))
    call = extreme_call(case, gates)
    want, peer, before = oracle(call), oracle(call, torch.float32), call["state"].clone()
    assert torch.isfinite(want.out).all()
    on, snapshots = target.put(call), target.put(case.snapshots())
    out = target.decode(**on, intermediate_states=snapshots)
    assert_within(out, peer.out.to(case.dtype), want.out)
    assert_within(vk(snapshots, case), peer.states, want.states, "states")
    if gates == "nothing happens":
        assert_same(snapshots[:, 0, 0].cpu(), before[slots(call), 0], "state")


@pytest.mark.parametrize("gates", GATES)
def test_a_window_of_extreme_gates_folds_to_their_states(target: Target, gates: str) -> None:
    """Records of decay 0 and 1, of which every number of tokens is accepted."""
    case = Case(4, 3, (1, 2, 64, 64), torch.bfloat16)
    if target.device == "cpu" and target.backend != "reference":
        case = case.with_(shape=(1, 2, 16, 16))
    call = extreme_call(case, gates)
    want, peer, before = oracle(call), oracle(call, torch.float32), call["state"].clone()
    on, draft = target.put(call), case.draft(3, target.device)
    none = torch.zeros(4, dtype=torch.int32, device=target.device)
    out = target.verify(**on, draft=draft, num_accepted=none)
    assert_within(out, peer.out.to(case.dtype), want.out)
    accepted = target.put(torch.arange(4, dtype=torch.int32))
    draft.flush(on["state"], accepted, on["state_indices"], backend=target.backend)
    got = on["state"][slots(call)].cpu()
    assert_same(got[0], before[slots(call)[0]], "nothing accepted")
    for b in range(1, 4):
        assert_within(got[b], peer.states[b, b - 1], want.states[b, b - 1], f"{b} accepted")


def slots(call: dict[str, Any]) -> torch.Tensor:
    return call["state_indices"].long()


# a thousand windows -------------------------------------------------------------------------------


def accept(call: dict[str, Any], S: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """S [B, HV, DV, DK] after the first n[b] tokens of a window, token by token in its dtype."""
    group = S.shape[1] // call["k"].shape[2]
    k, v = call["k"].to(S.dtype), call["v"].to(S.dtype)
    k = (k * (k.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).repeat_interleave(group, 2)
    g, beta = gates_of(call, S.dtype)
    for t in range(k.shape[1]):
        new = S * g[:, t, :, None, None]
        u = beta[:, t, :, None] * (v[:, t] - (new @ k[:, t, ..., None])[..., 0])
        new = new + u[..., None] * k[:, t, :, None, :]
        S = torch.where((n > t)[:, None, None, None], new, S)
    return S


def thousand(target: Target, case: Case, rounds: int = 1000) -> None:
    """The state is at most 4 times as far from float64 as decoding token by token in float32."""
    first, T = target.put(case.call()), case.T
    first["A_log"].fill_(-6.0)
    g = torch.Generator(device=target.device).manual_seed(5)
    state, draft = first["state"], case.draft(T, target.device, torch.bfloat16)
    exact, single = state.double(), state.clone()
    window: dict[str, Any] | None = None
    for i in range(rounds + 1):
        call = dict(first)
        for name in ("q", "k", "v", "a", "b"):
            shape, device = first[name].shape, target.device
            call[name] = torch.randn(shape, device=device, generator=g).to(case.dtype)
        n = torch.randint(0, T + 1, (case.B,), device=target.device, generator=g)
        if window is None:
            n.zero_()
        else:
            exact, single = accept(window, exact, n), accept(window, single, n)
        if i < rounds:
            target.verify(**call, draft=draft, num_accepted=n)
            window = call
        else:
            draft.flush(state, n, backend=target.backend)
    error, peer = ((x.double() - exact).abs() for x in (state, single))
    assert peer.max() > 0 and error.max() <= 4 * peer.max() and error.norm() <= 4 * peer.norm()


def test_a_thousand_windows() -> None:
    thousand(
        Target("reference", "cpu"),
        Case(2, 3, (1, 2, 16, 16), torch.bfloat16, index=None, spare=0),
    )


@pytest.mark.gpu
def test_a_thousand_windows_of_a_real_layer(card: Target) -> None:
    rounds = 100 if card.backend == "reference" else 1000
    thousand(card, Case(4, 4, (16, 32, 128, 128), torch.bfloat16, index=None, spare=0), rounds)


# addresses, streams, graphs -----------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["vk", "kv"])
def test_slot_5000_of_64_heads(card: Target, layout: str) -> None:
    """5001 slots of 4 MiB: bytes beyond 2^34, elements beyond 2^32."""
    if card.backend == "reference":
        pytest.skip("the reference computes no addresses of its own: torch indexes the pool")
    case = Case(3, 2, (16, 64, 128, 128), torch.bfloat16, layout=layout)
    near = card.put(case.call())
    pool = torch.empty(5001, *near["state"].shape[1:], device="cuda")
    far = near | {"state": pool, "state_indices": card.put(torch.tensor([5000, 4097, 2049]))}
    pool[far["state_indices"]] = near["state"][slots(near)]
    out = card.decode(**far)
    assert_same(out, card.decode(**near))
    assert_same(pool[far["state_indices"]], near["state"][slots(near)], "state")
    sizes = (2, 16, 64, 128)
    drafts = [cutemoe.GDNDraft.allocate(len(c["state"]), *sizes) for c in (far, near)]
    for n in (0, 2, 1):
        accepted = torch.full((3,), n, dtype=torch.int32, device="cuda")
        got, want = (
            card.verify(**c, draft=d, num_accepted=accepted)
            for c, d in zip((far, near), drafts, strict=True)
        )
        assert_same(got, want)
        assert_same(pool[far["state_indices"]], near["state"][slots(near)], "state")


@pytest.mark.gpu
def test_two_streams_share_nothing(card: Target) -> None:
    """Two pools on two streams at once, as each gives alone; the first call compiles."""
    case = Case(16, 4, (4, 8, 128, 128), torch.bfloat16)
    calls = [card.put(case.with_(seed=s).call()) for s in (0, 50)]
    alone = [c | {"state": c["state"].clone()} for c in calls]
    accepted = torch.arange(16, dtype=torch.int32, device="cuda") % 5

    def run(call: dict[str, Any], rounds: int) -> list[torch.Tensor]:
        draft = case.draft(4, "cuda")
        outs = []
        for _ in range(rounds):
            outs.append(card.verify(**call, draft=draft, num_accepted=accepted))
            outs.append(card.decode(**call, update_state=False))
        return outs

    want = [run(c, 10) for c in alone]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    got = []
    for call, stream in zip(calls, streams, strict=True):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(5_000_000)
            got.append(run(call, 10))
    torch.cuda.synchronize()
    for one, other in zip(got, want, strict=True):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    for call, other in zip(calls, alone, strict=True):
        assert_same(call["state"], other["state"], "state")


@pytest.mark.gpu
def test_a_graph_replays_with_other_slots_and_other_acceptance(card: Target) -> None:
    """Rows change slots and become padding between replays; the windows stay with the slots."""
    case = Case(6, 3, (2, 4, 128, 128), torch.bfloat16, spare=4)
    call = card.put(case.call())
    twin = call | {"state": call["state"].clone()}
    warm = call | {"state": call["state"].clone()}
    drafts = [case.draft(3, "cuda", torch.bfloat16) for _ in range(3)]
    accepted = torch.zeros(6, dtype=torch.int32, device="cuda")
    out = torch.empty_like(call["v"])
    card.verify(**warm, draft=drafts[2], num_accepted=accepted, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        card.verify(**call, draft=drafts[0], num_accepted=accepted, out=out)
    for seed in range(8):
        g = draw.generator(seed)
        index = torch.randperm(case.slots(), generator=g)[:6].int()
        index[torch.rand(6, generator=g) < 0.3] = -1
        call["state_indices"].copy_(index)
        accepted.copy_(torch.randint(-1, 5, (6,), generator=g))
        graph.replay()
        assert_same(out, card.verify(**twin, draft=drafts[1], num_accepted=accepted))
        assert (out[(index < 0).cuda()] == 0).all()
        assert_same(call["state"], twin["state"], "state")
        assert_same(drafts[0].mark, drafts[1].mark, "windows")
