"""A bound call does what the call does with what its tensors hold then, and nothing before."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

import cutemoe
from cutemoe.runtime import capture
from cutemoe.runtime.backend import Backend
from tests import strategies as draw
from tests.close import assert_same
from tests.gdn.cases import Case
from tests.moe.cases import Target, random_layer, targets


class Bindable(NamedTuple):
    """A call: function, arguments, and those that a call reads anew."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[torch.Tensor, ...]

    def __call__(self) -> Any:
        return self.function(*self.args, **self.kwargs)


def routing(target: Target) -> Bindable:
    logits = target.put(draw.normal((7, 12), 1))
    return Bindable(cutemoe.route, (logits, 3), {"backend": target.backend}, (logits,))


def layer(target: Target, tokens: int = 5, workspace: bool = False) -> Bindable:
    made = random_layer("mxfp4", "bf16", E=6, H=128, I=64, seed=1)
    moe = made.prepared(target)
    x = target.put(draw.normal((tokens, 128), 2, torch.bfloat16))
    ids = target.put(torch.arange(2 * tokens, dtype=torch.int32).view(tokens, 2) % 6)
    weights = target.put(torch.rand(tokens, 2, generator=draw.generator(3)))
    kwargs: dict[str, Any] = {"backend": target.backend}
    if workspace:
        kwargs |= {"workspace": cutemoe.Workspace.for_moe(moe, tokens, 2)}
        kwargs |= {"out": torch.full_like(x, torch.nan)}
    return Bindable(cutemoe.fused_moe, (x, moe, ids, weights), kwargs, (x, ids, weights))


def groups(target: Target) -> Bindable:
    w = cutemoe.quantize(draw.normal((3, 64, 128), 4), "mxfp4")
    packed = cutemoe.prepare_grouped_gemm(w, device=target.device, backend=target.backend)
    x = target.put(draw.normal((9, 128), 5, torch.bfloat16))
    offsets = target.put(torch.tensor([0, 2, 2, 8], dtype=torch.int32))
    kwargs = {"backend": target.backend}
    return Bindable(cutemoe.grouped_gemm, (x, packed, offsets), kwargs, (x, offsets))


def heads(target: Target, verify: bool = False) -> Bindable:
    case = Case(B=3, T=2, index=torch.int32, shape=(1, 2, 64, 64))
    call: dict[str, Any] = {
        k: target.put(v) if isinstance(v, torch.Tensor) else v for k, v in case.call().items()
    }
    call["backend"] = target.backend
    if not verify:
        return Bindable(cutemoe.gdn_decode, (), call, (call["q"], call["v"], call["state"]))
    draft = case.draft(4, str(target.device))
    accepted = target.put(torch.tensor([1, 0, 2], dtype=torch.int32))
    call |= {"draft": draft, "num_accepted": accepted}
    inputs = (call["v"], call["state"], accepted, *draft.tensors)
    return Bindable(cutemoe.gdn_verify, (), call, inputs)


CALLS: dict[str, Callable[[Target], Bindable]] = {
    "route": routing,
    "few rows": layer,
    "many rows": partial(layer, tokens=40, workspace=True),
    "groups": groups,
    "decode": heads,
    "verify": partial(heads, verify=True),
}


def put(inputs: tuple[torch.Tensor, ...], values: list[torch.Tensor]) -> None:
    for t, value in zip(inputs, values, strict=True):
        t.copy_(value)


def bits(result: Any) -> list[torch.Tensor]:
    return [t.clone() for t in (result if isinstance(result, tuple) else (result,))]


@pytest.mark.parametrize("target", targets("cute", "triton"))
@pytest.mark.parametrize("name", CALLS)
def test_a_bound_call_is_the_call(name: str, target: Target, monkeypatch: pytest.MonkeyPatch):
    """With other contents, twice; on a GPU by launches alone, in a CUDA graph and on a stream."""
    target.available()
    if (name, target.backend) == ("route", "cute"):
        pytest.skip("route has no such back end")
    call = CALLS[name](target)
    kept = [t.clone() for t in call.inputs]
    target.willing(call.function.__name__, *call.args, **call.kwargs)
    step = cutemoe.bind(call.function, *call.args, **call.kwargs)
    for t, before in zip(call.inputs, kept, strict=True):
        assert_same(t, before)
    # of floating point inputs that are read alone
    others = [torch.roll(t, 1, 0) if t.is_floating_point() and t.ndim > 1 else t for t in kept]
    want, after = [], []
    for values in (kept, others):
        put(call.inputs, values)
        want.append(bits(call()))
        after.append([t.clone() for t in call.inputs])
    assert not torch.equal(want[0][0], want[1][0])
    if target.device == "cuda":
        monkeypatch.delattr(Backend, "run")
    for values, results, left in zip((kept, others), want, after, strict=True):
        put(call.inputs, values)
        result = step()
        assert result is step.result
        for a, b in zip([*bits(result), *call.inputs], [*results, *left], strict=True):
            assert_same(a, b)
    if target.device != "cuda":
        return
    side = torch.cuda.Stream()
    put(call.inputs, kept)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    side.synchronize()
    assert_same(bits(step.result)[0], want[0][0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    put(call.inputs, others)
    graph.replay()
    assert_same(bits(step.result)[0], want[1][0])


def test_a_tensor_may_come_twice_and_no_tokens_are_nothing() -> None:
    call: dict[str, Any] = Case(B=2, T=1, shape=(2, 2, 64, 64), index=torch.int32).call()
    call["k"] = call["q"]
    again: dict[str, Any] = {
        k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in call.items()
    }
    again["k"] = again["q"]
    step = cutemoe.bind("gdn_decode", **call)
    assert torch.equal(step(), cutemoe.gdn_decode(**again))
    assert torch.equal(call["state"], again["state"])
    ids, weights = cutemoe.bind("route", torch.empty(0, 4), 2)()
    assert ids.shape == weights.shape == (0, 2)


def test_a_malformed_call_is_refused() -> None:
    with pytest.raises(cutemoe.InvalidCall, match="top_k"):
        cutemoe.bind("route", torch.zeros(2, 4), 5)
    with pytest.raises(cutemoe.InvalidCall, match="one of"):
        cutemoe.bind("other")
    with pytest.raises(TypeError, match="colour"):
        cutemoe.bind("route", torch.zeros(2, 4), 2, colour="red")


def test_the_tensors_of_nested_lists_each_once() -> None:
    a, b = torch.zeros(1), torch.zeros(1)
    found = capture.distinct([a, (b, [a, 3, None]), "x"])
    assert len(found) == 2 and found[0] is a and found[1] is b
