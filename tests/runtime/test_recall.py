"""A recalled call does what a checked one does: the same result, or the same error before any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cutemoe
from cutemoe.gdn import api
from cutemoe.gemm import api as gemm_api
from cutemoe.moe import api as moe_api
from cutemoe.runtime import recall, tune
from tests import strategies as draw
from tests.gdn.cases import Case, cases
from tests.moe.cases import random_layer
from tests.strategies import examples

HAS_GUARDS = recall.TensorGuards is not None
pytestmark = pytest.mark.skipif(not HAS_GUARDS, reason="this torch has no tensor guards")


@pytest.fixture(autouse=True)
def on_this_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU calls are recalled too, and from an empty memory."""
    monkeypatch.setattr(recall, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(recall, "_current_device", lambda: None)
    monkeypatch.setattr(recall, "CALLS", 1)
    memories = (
        api._DECODED, api._VERIFIED, moe_api._KNOWN, moe_api._ROUTED, gemm_api._KNOWN
    )  # fmt: skip
    for memory in memories:
        memory.forget()
    yield
    for memory in memories:
        memory.forget()


class Counted:
    """How many calls the operator saw."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.calls = 0
        real = getattr(api.op, name)

        def counting(*args: Any) -> Any:
            self.calls += 1
            return real(*args)

        monkeypatch.setattr(api.op, name, counting)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch, "decode")


def cloned(call: dict[str, Any]) -> dict[str, Any]:
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in call.items()}


def test_the_second_call_goes_around_the_operator(decoded: Counted) -> None:
    call = Case(index=torch.int32).call()
    first, second = cloned(call), cloned(call)
    want = cutemoe.gdn_decode(**first)
    got = cutemoe.gdn_decode(**second)
    assert decoded.calls == 1
    assert torch.equal(got, want) and torch.equal(first["state"], second["state"])


@settings(max_examples=examples(0.3))
@given(case=cases(B=2, T=2), with_out=st.booleans(), snapshots=st.booleans())
def test_recalled_calls_give_the_same_bits(case: Case, with_out: bool, snapshots: bool) -> None:
    def run(call: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        more: dict[str, Any] = {"intermediate_states": case.snapshots()} if snapshots else {}
        if with_out:
            more["out"] = torch.full_like(call["v"], torch.nan)
        out = cutemoe.gdn_decode(**call, **more)
        return out, call["state"], *more.values()

    api._DECODED.forget()
    call = case.call()
    want, again = run(cloned(call)), run(cloned(call))
    assert len(api._DECODED._known) == 1
    for a, b in zip(want, again, strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_another_configuration_is_tried_on_calls_that_are_known(decoded: Counted) -> None:
    call = Case(index=torch.int32).call()
    for _ in range(2):
        cutemoe.gdn_decode(**cloned(call))
    assert decoded.calls == 1
    with tune.trying(None):
        cutemoe.gdn_decode(**cloned(call))
    assert decoded.calls == 2
    cutemoe.gdn_decode(**cloned(call))
    assert decoded.calls == 3


def test_verification_is_recalled(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Counted(monkeypatch, "verify")
    case = Case(B=2, T=3, index=torch.int32)
    accepted = torch.tensor([2, 0], dtype=torch.int32)
    results = []
    for remembers in (True, False):
        call, draft = case.call(), case.draft(4, "cpu")
        for _ in range(3):
            if not remembers:
                api._VERIFIED.forget()
            out = cutemoe.gdn_verify(**call, draft=draft, num_accepted=accepted)
        results.append((out, call["state"]))
    assert seen.calls == 1 + 3
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "q in another dtype": lambda c: c | {"q": c["q"].double()},
    "k of another shape": lambda c: c | {"k": c["k"][:, :, :, :-1]},
    "v that is no tensor": lambda c: c | {"v": c["v"].numpy()},
    "v on another device": lambda c: c | {"v": c["v"].to("meta")},
    "q that is None": lambda c: c | {"q": None},
    "a state whose rows are apart": lambda c: c | {"state": c["state"].mT},
    "a state of one slot": lambda c: c | {"state": c["state"][:1], "state_indices": None},
    "int16 slots": lambda c: c | {"state_indices": c["state_indices"].short()},
    "a flag that equals True": lambda c: c | {"qk_l2norm": 1},
    "update_state of 0": lambda c: c | {"update_state": 0},
    "a scale that is a flag": lambda c: c | {"scale": True},
    "a scale that cannot be hashed": lambda c: c | {"scale": [1.0]},
    "an unknown layout": lambda c: c | {"state_layout": "kk"},
    "an unknown back end": lambda c: c | {"backend": "other"},
    "g beside a": lambda c: c | {"g": c["a"].float()},
    "no beta": lambda c: {k: v for k, v in c.items() if k != "b"},
    "a gradient": lambda c: c | {"k": c["k"].clone().requires_grad_()},
    "out of another dtype": lambda c: c | {"out": c["v"].double()},
    "out that overlaps itself": lambda c: c | {"out": c["v"][:1].expand(c["v"].shape)},
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("out", [False, True])
def test_a_bad_call_after_a_good_one_is_refused(change: str, out: bool, decoded: Counted) -> None:
    """The error is that of a first call, and nothing was written."""
    call = Case(B=2, T=2, index=torch.int32, l2norm=True).call()
    call |= {"scale": 1.0, "update_state": True, "backend": "auto"}
    if out:
        call["out"] = torch.zeros_like(call["v"])
    bad = CHANGES[change](call)
    with pytest.raises(cutemoe.InvalidCall) as first:
        cutemoe.gdn_decode(**bad)
    cutemoe.gdn_decode(**call)
    before = call["state"].clone()
    calls = decoded.calls
    with pytest.raises(cutemoe.InvalidCall) as second:
        cutemoe.gdn_decode(**bad)
    assert str(first.value) == str(second.value)
    assert torch.equal(call["state"], before)
    cutemoe.gdn_decode(**call)
    assert decoded.calls <= calls + 1


def test_changed_calls_are_checked(decoded: Counted) -> None:
    """Another shape, stride, dtype, alignment, environment: a first call each."""
    case = Case(B=2, T=2, index=torch.int32, state=torch.float32)
    call: dict[str, Any] = case.call()
    cutemoe.gdn_decode(**call)
    pool = torch.zeros(case.slots() + 1, *call["state"].shape[1:])
    odd = torch.zeros(call["q"].numel() + 1)[1:].view(call["q"].shape).copy_(call["q"])
    others: tuple[dict[str, Any], ...] = (
        case.with_(B=1).call(),
        case.with_(T=1).call(),
        call | {"state": pool},
        call | {"state_indices": call["state_indices"].long()},
        call | {"v": call["v"].transpose(1, 2).contiguous().transpose(1, 2)},
        call | {"q": odd},
        call | {"scale": 0.5},
    )
    for n, other in enumerate(others):
        cutemoe.gdn_decode(**other)
        assert decoded.calls == n + 2
    assert odd.data_ptr() % 16
    cutemoe.gdn_decode(**others[5])
    assert decoded.calls == len(others) + 2, "an odd address was recalled"


def test_the_environment_is_looked_at(decoded: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Case(index=torch.int32).call()
    cutemoe.gdn_decode(**call)
    monkeypatch.setenv("CUTEMOE_BACKEND", "nothing")
    with pytest.raises(cutemoe.InvalidCall, match="nothing"):
        cutemoe.gdn_decode(**call)


def test_what_watches_sees_the_operator(decoded: Counted) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    call = Case(index=torch.int32).call()
    cutemoe.gdn_decode(**call)
    with Watch():
        cutemoe.gdn_decode(**call)
    assert any("cutemoe.gdn_decode" in name for name in seen)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        cutemoe.gdn_decode(**call)
    assert any(e.name == "cutemoe::gdn_decode" for e in profile.events() or ())
    calls = decoded.calls
    cutemoe.gdn_decode(**call)
    assert decoded.calls == calls


def test_compiles_after_it_was_recalled(decoded: Counted) -> None:
    call: dict[str, Any] = Case(index=torch.int32).call()
    want = cutemoe.gdn_decode(**cloned(call))
    cutemoe.gdn_decode(**cloned(call))
    compiled = torch.compile(cutemoe.gdn_decode, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**cloned(call)), want)


@pytest.mark.parametrize("activations", ["bf16", "fp8", "nvfp4"])
def test_layers_are_recalled(activations: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another batch, layer, activation or offset is a call of its own; the bits stay."""
    calls = []
    real = moe_api.operator.fused_moe
    monkeypatch.setattr(moe_api.operator, "fused_moe", lambda *a: (calls.append(a), real(*a)))
    format = "nvfp4" if activations == "nvfp4" else "mxfp4"
    first, second = (
        random_layer(format, activations, seed=s, biases=s == 0).prepared() for s in (0, 1)
    )
    seen = 0
    for moe in (first, second):
        for T in (3, 4):
            x = draw.normal((T, moe.hidden), T, torch.bfloat16)
            ids, weights = cutemoe.route(draw.normal((T, 5), T + 1), 2)
            for activation in (cutemoe.SwiGLU(), cutemoe.SwiGLU(1.702, 1.0, 7.0)):
                for offset in (0, 1):
                    options: dict[str, Any] = {
                        "activation": activation, "expert_offset": offset
                    }  # fmt: skip
                    want = cutemoe.fused_moe(x, moe, ids, weights, **options)
                    seen += 1
                    assert len(calls) == seen
                    got = cutemoe.fused_moe(x, moe, ids, weights, **options)
                    assert len(calls) == seen and torch.equal(got, want)
    if activations == "bf16":
        for w in (weights, weights.bfloat16()):
            want = cutemoe.fused_moe(x, second, ids, w, rounding="eager")
            seen += 1
            assert len(calls) == seen and not torch.equal(want, got)
            assert torch.equal(cutemoe.fused_moe(x, second, ids, w, rounding="eager"), want)
            assert len(calls) == seen
    with pytest.raises(cutemoe.InvalidCall, match="expert_offset"):
        cutemoe.fused_moe(x, second, ids, weights, expert_offset=True)
    with pytest.raises(cutemoe.InvalidCall, match="weights"):
        cutemoe.fused_moe(x, second, ids, weights.half())


def test_grouped_gemms_are_recalled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = gemm_api._grouped_gemm
    monkeypatch.setattr(gemm_api, "_grouped_gemm", lambda *a: (calls.append(a), real(*a)))
    x, offsets = draw.normal((7, 64), 1, torch.bfloat16), torch.tensor([0, 2, 5], dtype=torch.int32)
    for n, format in enumerate(("mxfp4", "nvfp4", "int4")):
        kwargs = {"group_size": 32} if format == "int4" else {}
        w = cutemoe.quantize(draw.normal((2, 48, 64), 2), format, **kwargs)
        want = cutemoe.grouped_gemm(x, w, offsets)
        assert torch.equal(cutemoe.grouped_gemm(x, w, offsets), want) and len(calls) == n + 1
    with pytest.raises(cutemoe.InvalidCall, match="offsets"):
        cutemoe.grouped_gemm(x, w, offsets.long())
    before = len(calls)
    cutemoe.grouped_gemm(x[:5], w, offsets)
    assert len(calls) == before + 1


def test_calls_that_differ_in_strides_alone_are_all_known(decoded: Counted) -> None:
    """As the layers of a model may: they do not push one another out."""
    call: dict[str, Any] = Case(B=2, T=2, index=torch.int32).call()
    other = call | {"v": call["v"].transpose(1, 2).contiguous().transpose(1, 2)}
    for _ in range(3):
        cutemoe.gdn_decode(**call)
        cutemoe.gdn_decode(**other)
    assert decoded.calls == 2


def test_parameters_are_recalled_where_no_gradient_is_asked_for(decoded: Counted) -> None:
    """As models hold A_log and dt_bias; with gradients on, the call is refused as ever."""
    call: dict[str, Any] = Case(B=2, T=2, index=torch.int32).call()
    for name in ("A_log", "dt_bias"):
        call[name] = torch.nn.Parameter(call[name].float())
    with torch.no_grad():
        for _ in range(3):
            cutemoe.gdn_decode(**call)
    assert decoded.calls == 1
    with pytest.raises(cutemoe.InvalidCall, match="A_log"):
        cutemoe.gdn_decode(**call)
    with torch.no_grad():
        cutemoe.gdn_decode(**call)
    assert decoded.calls == 1


def _constant(n: int) -> Any:
    return lambda tensors, addresses: n


def test_a_size_that_comes_once_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recall, "CALLS", 3)
    memory, x, made = recall.Recall(size=4), torch.zeros(4), []
    for n in range(20):
        memory.keep(n, (x,), partial(made.append, n))
    assert not made and len(memory._seen) == 4 and not memory._known
    for _ in range(2):
        memory.keep("often", (x,), partial(made.append, "often"))
    memory.keep("often", (x,), partial(_constant, 7))
    assert made == [] and memory.find("often", (x,))


def test_memory_is_bounded() -> None:
    memory = recall.Recall(size=3)
    x = torch.zeros(4)
    for n in range(5):
        memory.keep(n, (x,), partial(_constant, n))
    found = [memory.find(n, (x,)) for n in range(5)]
    assert [f and f[0]([], []) for f in found] == [None, None, 2, 3, 4]
    assert found[-1] and found[-1][1] == [x.data_ptr()]
