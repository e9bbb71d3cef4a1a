"""Recorded launches take the tensors of another call, or are not recorded at all."""

from __future__ import annotations

import gc
import threading
import weakref
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

import cutemoe
from cutemoe.gdn import api as gdn_api
from cutemoe.gemm import api as gemm_api
from cutemoe.moe import api as moe_api
from cutemoe.runtime import replay
from tests import strategies as draw
from tests.close import assert_same
from tests.gdn.cases import Case
from tests.moe.cases import Target, random_layer


class Call(NamedTuple):
    """Tensors in three roles."""

    x: torch.Tensor
    w: torch.Tensor | None
    scratch: torch.Tensor

    def roles(self) -> list[torch.Tensor | None]:
        return list(self)


def call_of(seed: int, w: bool = True) -> Call:
    x = torch.full((4, 8), float(seed))
    scratch = torch.zeros(64 + seed, dtype=torch.uint8)[seed:]
    return Call(x, torch.full((2,), seed + 0.5) if w else None, scratch)


SEEN: list[Any] = []


def kernel(*args: Any) -> None:
    SEEN.append(args)


def run(t: Call) -> None:
    """Two launches, with a part of the scratch memory as it is and as numbers."""
    part = t.scratch[16:48].view(torch.float32).view(2, 4)
    replay.call(kernel, t.x, (part, (t.w, 3)), "word")
    launch = replay.Launch((t.x, part), lambda at: SEEN.append(tuple(at)), by_address=True)
    if not replay.noted(lambda: launch):
        launch.start([a.data_ptr() for a in launch.tensors])


def same(a: Any, b: Any) -> bool:
    """The same memory, seen in the same way."""
    if isinstance(a, torch.Tensor):
        return (a.data_ptr(), a.dtype, a.shape, a.stride()) == (
            b.data_ptr(), b.dtype, b.shape, b.stride()
        )  # fmt: skip
    if isinstance(a, tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def launched(function: Any, t: Call) -> list[Any]:
    SEEN.clear()
    function(t)
    return list(SEEN)


def test_nothing_is_launched_while_it_is_recorded() -> None:
    SEEN.clear()
    again = replay.replayed(run, call_of(16))
    assert not SEEN and again is not run


def test_other_tensors_take_the_roles() -> None:
    for w in (True, False):
        again = replay.replayed(run, call_of(0, w))
        for seed in (0, 16, 16, 32):
            t = call_of(seed, w)
            want = launched(run, t)
            assert len(want) == 2 and same(tuple(launched(again, t)), tuple(want))


def test_a_tensor_of_nobody_is_not_replayed() -> None:
    def copies(t: Call) -> None:
        replay.call(kernel, t.x.clone())

    assert replay.replayed(copies, call_of(16)) is copies


def test_what_two_roles_share_is_not_replayed() -> None:
    one = call_of(16)
    twice = one._replace(w=one.x)
    assert replay.replayed(run, twice) is run
    # neighbours in one storage: whose is a view of it?
    both = torch.zeros(8, 8)
    sides = Call(both[:4], both[4:], one.scratch)

    def views(t: Call) -> None:
        replay.call(kernel, t.x[1:])

    def wholes(t: Call) -> None:
        replay.call(kernel, t.x, t.w)

    assert replay.replayed(views, sides) is views
    again = replay.replayed(wholes, sides)
    t = call_of(32)
    assert again is not wholes and same(tuple(launched(again, t)), ((t.x, t.w),))


def test_memory_of_earlier_calls_is_given_back() -> None:
    again = replay.replayed(run, call_of(16))
    t = call_of(16)
    again(t)
    alive = weakref.ref(t.scratch.untyped_storage())
    SEEN.clear()
    assert alive() is not None
    del t
    gc.collect()
    assert alive() is None


def test_a_tensor_with_other_memory_or_in_another_role_is_seen_anew() -> None:
    def views(t: Call) -> None:
        replay.call(kernel, t.x[1:], t.scratch[2:])

    def fresh() -> torch.Tensor:
        return torch.zeros(4, 8)

    again = replay.replayed(views, Call(fresh(), None, fresh()))
    assert again is not views
    a, b = fresh(), fresh()
    for t in (Call(a, None, b), Call(b, None, a), Call(a, None, b)):
        assert same(tuple(launched(again, t)), tuple(launched(views, t)))
    a.data = fresh()
    t = Call(a, None, b)
    assert same(tuple(launched(again, t)), tuple(launched(views, t)))


def test_recorded_tensors_are_not_kept() -> None:
    t = call_of(16)
    again = replay.replayed(run, t)
    alive = [weakref.ref(x.untyped_storage()) for x in t if x is not None]
    del t
    gc.collect()
    assert again is not run and not any(ref() for ref in alive)


def test_other_threads_launch() -> None:
    SEEN.clear()
    with replay.recording() as launches:
        thread = threading.Thread(target=run, args=(call_of(16),))
        thread.start()
        thread.join()
    assert not launches and len(SEEN) == 2


def test_an_error_ends_a_recording() -> None:
    try:
        with replay.recording():
            raise ValueError
    except ValueError:
        pass
    assert len(launched(run, call_of(16))) == 2


def layer_calls(backend: str, activations: str, with_workspace: bool) -> list[Any]:
    """Calls of two layers with one signature, each with tensors of its own."""
    found = []
    for seed in (1, 2, 3):
        layer = random_layer("mxfp4", activations, E=6, H=192, I=128, seed=seed)
        moe = layer.prepared(Target(backend, "cuda"))
        x = draw.normal((37, 192), seed, layer.dtype).cuda()
        ids, weights = cutemoe.route(draw.normal((37, 6), seed).cuda(), 2)
        more: dict[str, Any] = {"backend": backend}
        if with_workspace:
            more["workspace"] = cutemoe.Workspace.for_moe(moe, 37, 2)
        found.append(partial(cutemoe.fused_moe, x, moe, ids, weights, **more))
    return found


def gemm_calls(backend: str) -> list[Any]:
    found = []
    for seed in (1, 2, 3):
        w = cutemoe.quantize(draw.normal((5, 64, 128), seed), "mxfp4")
        packed = cutemoe.prepare_grouped_gemm(w, device="cuda", backend=backend)
        x = draw.normal((20, 128), seed, torch.bfloat16).cuda()
        offsets = torch.tensor([0, seed, 7, 7, 15, 18], dtype=torch.int32, device="cuda")
        found.append(partial(cutemoe.grouped_gemm, x, packed, offsets, backend=backend))
    return found


def head_calls(backend: str, verify: bool) -> list[Any]:
    found = []
    for seed in (1, 2, 3):
        case = Case(B=3, T=2, seed=seed, index=torch.int32, shape=(1, 2, 128, 128))
        given = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in case.call().items()}
        draft = case.draft(4, "cuda")
        accepted = torch.tensor([0, 1, 2], dtype=torch.int32, device="cuda")

        def call(given=given, draft=draft, accepted=accepted):
            state = given["state"].clone()
            if not verify:
                return cutemoe.gdn_decode(**{**given, "state": state}, backend=backend), state
            for part in draft.tensors:
                part.zero_()
            more = {"draft": draft, "num_accepted": accepted, "backend": backend}
            call = {**given, "state": state, **more}
            cutemoe.gdn_verify(**call)
            return cutemoe.gdn_verify(**call), state

        found.append(call)
    return found


CALLS = {
    **{
        f"layer {b} {a} {w}": partial(layer_calls, b, a, w)
        for b in ("cute", "triton")
        for a in ("bf16", "fp8")
        for w in (True, False)
    },
    **{f"groups {b}": partial(gemm_calls, b) for b in ("cute", "triton")},
    **{
        f"heads {b} {v}": partial(head_calls, b, v)
        for b in ("cute", "triton")
        for v in (False, True)
    },
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_recalled_calls_have_the_bits_of_checked_ones(name: str) -> None:
    """On a card, in a CUDA graph too."""
    if "cute" in name:
        pytest.importorskip("cutlass")
    memories = (moe_api._KNOWN, gemm_api._KNOWN, gdn_api._DECODED, gdn_api._VERIFIED)

    def forget() -> None:
        for memory in memories:
            memory.forget()

    def bits(found: Any) -> tuple[torch.Tensor, ...]:
        return found if isinstance(found, tuple) else (found,)

    calls = CALLS[name]()
    want = []
    with torch.no_grad():
        for call in calls:
            forget()
            want.append(bits(call()))
        assert not torch.equal(want[0][0], want[1][0])
        forget()
        for _ in range(2):
            for call, wanted in zip(calls, want, strict=True):
                for a, b in zip(bits(call()), wanted, strict=True):
                    assert_same(a, b)
        assert sum(len(m._known) for m in memories) == 1
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = bits(calls[1]())
        graph.replay()
        for a, b in zip(found, want[1], strict=True):
            assert_same(a, b)
