"""What only the CuTe back end can do wrong: alignment, capture, long windows, many steps."""

from typing import Any

import pytest
import torch

import cutemoe
from cutemoe.runtime.compile import build_count
from tests.gdn.cases import Case, Target, oracle

pytestmark = pytest.mark.gpu
CUTE = Target("cute", "cuda")


@pytest.fixture(autouse=True)
def runs_here():
    CUTE.available()


def shifted(x: torch.Tensor, n: int) -> torch.Tensor:
    """The same values n elements into other memory."""
    flat = torch.empty(x.numel() + n, dtype=x.dtype, device=x.device)
    return flat[n:].view(x.shape).copy_(x)


def near(a: torch.Tensor, b: torch.Tensor, factor: float) -> bool:
    a, b = a.double().cpu(), b.double().cpu()
    return bool((a - b).norm() <= factor * b.norm())


@pytest.mark.parametrize("layout", ["vk", "kv"])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_tensors_off_every_boundary_give_the_same_bits(layout, state):
    case = Case(3, 5, (1, 2, 128, 128), torch.bfloat16, state, layout)
    call = CUTE.put(case.call())
    other = {k: shifted(x, 1) if k in ("q", "k", "v", "state") else x for k, x in call.items()}
    assert torch.equal(CUTE.decode(**call), CUTE.decode(**other))
    assert torch.equal(call["state"], other["state"])


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T", [1, 4, 7])
@pytest.mark.parametrize("B", [450, 1201])
def test_a_call_of_many_sequences_is_calls_of_a_few(B, T, state):
    """Some of them padding, and more than a wave of CTAs; calls of 50 are the measure."""
    case = Case(B, T, (2, 4, 64, 64), torch.bfloat16, state, spare=3)
    call = CUTE.put(case.call())
    g = torch.Generator().manual_seed(B + T)
    live = (torch.rand(B, generator=g) < 0.8).cuda()
    call["state_indices"] = torch.where(live, call["state_indices"], -1)
    drafts = [case.draft(T, "cuda", torch.bfloat16) for _ in range(2)]
    for i in range(3):
        n = torch.randint(0, T + 1, (B,), generator=g).cuda()
        whole, parts = (call | {"state": call["state"].clone()} for _ in range(2))
        pieces = [_rows(parts, b, b + 50) for b in range(0, B, 50)]
        if i == 2:
            out = CUTE.decode(**whole)
            few = [CUTE.decode(**p) for p in pieces]
        else:
            out = CUTE.verify(**whole, draft=drafts[0], num_accepted=n)
            few = [
                CUTE.verify(**p, draft=drafts[1], num_accepted=n[50 * j : 50 * j + 50])
                for j, p in enumerate(pieces)
            ]
        assert torch.equal(out, torch.cat(few)) and bool((out[~live] == 0).all())
        assert torch.equal(whole["state"], parts["state"])
        assert bool(out.isfinite().all())
        call["state"] = whole["state"]


@pytest.mark.parametrize("DV", [128, 36])
@pytest.mark.parametrize("scattered", [False, True])
def test_tokens_with_states_between_are_single_tokens(DV, scattered):
    """To the bit, outputs and every state, in the layout that is decoded token by token."""
    case = Case(3, 5, (1, 3, 128, DV), torch.bfloat16, torch.float32, spare=20)
    call = CUTE.put(case.call())
    one = call | {"state": call["state"].clone()}
    slots = torch.arange(case.slots(), device="cuda").flip(0)
    free = torch.tensor([int(s) for s in slots if s not in call["state_indices"]][:15])
    given: dict[str, Any] = {"intermediate_states": CUTE.put(case.snapshots())}
    if scattered:
        given = {"intermediate_indices": CUTE.put(free.view(3, 5).to(torch.int32))}
    out = CUTE.decode(**call, **given)
    for t in range(5):
        part = {k: x[:, t : t + 1] if k in ("q", "k", "v", "a", "b") else x for k, x in one.items()}
        assert torch.equal(CUTE.decode(**part), out[:, t : t + 1])
        after = one["state"][one["state_indices"].long()]
        kept = call["state"][free.view(3, 5)[:, t].cuda()]
        assert torch.equal(after, kept if scattered else given["intermediate_states"][:, t])
    live = call["state_indices"].long()
    assert torch.equal(call["state"][live], one["state"][live])


def _rows(call: dict[str, Any], start: int, end: int) -> dict[str, Any]:
    """The call of some of the sequences, on the same pool."""
    part = ("q", "k", "v", "a", "b", "g", "beta", "state_indices")
    return {k: x[start:end] if k in part else x for k, x in call.items()}


@pytest.mark.parametrize("DV", [20, 48, 64, 100])
@pytest.mark.parametrize("layout", ["vk", "kv"])
def test_any_number_of_values(DV, layout):
    case = Case(2, 9, (1, 2, 128, DV), torch.bfloat16, torch.float32, layout)
    call = case.call()
    want = oracle(call)
    on = CUTE.put(call)
    steps = torch.full((2, 10, *on["state"].shape[1:]), torch.nan, device="cuda")
    out = CUTE.decode(**on, intermediate_states=steps)
    assert near(out, want.out, 4e-3)
    states = steps if layout == "vk" else steps.transpose(-1, -2)
    assert near(states[:, :9], want.states, 1e-6) and bool(states[:, 9].isnan().all())


def test_capture_needs_a_compiled_kernel_and_replays_with_new_numbers():
    case = Case(4, 3, (2, 4, 128, 128), torch.bfloat16, torch.float32)
    call = CUTE.put(case.call())
    draft = cutemoe.GDNDraft.allocate(call["state"].shape[0], 4, 2, 4, 128)
    accepted = torch.zeros(4, dtype=torch.int32, device="cuda")
    CUTE.verify(**call, draft=draft, num_accepted=accepted)
    before = build_count()
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(call["v"])
    with torch.cuda.graph(graph):
        CUTE.verify(**call, draft=draft, num_accepted=accepted, out=out)
    twin, twin_draft = call["state"].clone(), draft_copy(draft)
    for n in (3, 0, 2, 1, 3):
        accepted.fill_(n)
        graph.replay()
        want = CUTE.verify(**call | {"state": twin}, draft=twin_draft, num_accepted=accepted)
        assert torch.equal(out, want) and torch.equal(call["state"], twin)
    assert build_count() == before
    fresh = call | {"state": call["state"].half(), "qk_l2norm": False}
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(cutemoe.InvalidCall, match="before the capture"), torch.cuda.graph(graph):
        CUTE.decode(**fresh)


def draft_copy(draft: cutemoe.GDNDraft) -> cutemoe.GDNDraft:
    return type(draft)(*(x.clone() for x in draft.tensors))


def test_a_thousand_rounds_stay_as_near_as_float32_decoding():
    """Random acceptance against a float64 loop; the bar is 4 times the error of a float32 loop."""
    B, HQ, HV, D, T = 2, 1, 2, 128, 4
    g = torch.Generator(device="cuda").manual_seed(5)
    state = torch.randn(B, HV, D, D, device="cuda", generator=g)
    exact, single = state.double(), state.clone()
    draft = cutemoe.GDNDraft.allocate(B, T, HQ, HV, D)
    gates: dict[str, Any] = {
        "A_log": torch.full((HV,), -6.0, device="cuda"),
        "dt_bias": torch.zeros(HV).cuda(),
    }
    window: dict | None = None
    for _ in range(1000):
        call: dict[str, Any] = {
            n: torch.randn(B, T, h, D, device="cuda", generator=g).bfloat16()
            for n, h in (("q", HQ), ("k", HQ), ("v", HV))
        }
        call |= {n: torch.randn(B, T, HV, device="cuda", generator=g).bfloat16() for n in "ab"}
        n = torch.randint(0, T + 1, (B,), device="cuda", generator=g)
        cutemoe.gdn_verify(
            **call, **gates, state=state, draft=draft, num_accepted=n, backend="cute"
        )
        if window is not None:
            exact, single = step(window, gates, exact, n), step(window, gates, single, n)
        window = call
    error, peer = ((x.double() - exact).norm() for x in (state, single))
    assert error <= 4 * peer


def step(call: dict, gates: dict, S: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """The first n tokens of a window, in the dtype of S."""
    k, v = call["k"].to(S.dtype), call["v"].to(S.dtype)
    k = (k * (k.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).expand(-1, -1, S.shape[1], -1)
    x = torch.nn.functional.softplus(call["a"].to(S.dtype) + gates["dt_bias"].to(S.dtype))
    decay, beta = (-gates["A_log"].to(S.dtype).exp() * x).exp(), call["b"].to(S.dtype).sigmoid()
    for t in range(k.shape[1]):
        new = S * decay[:, t, :, None, None]
        u = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhvk,bhk->bhv", new, k[:, t]))
        new = new + u[..., None] * k[:, t, :, None, :]
        S = torch.where((n > t)[:, None, None, None], new, S)
    return S
