"""Recorded launches take the tensors of another call, or are not recorded at all."""

from __future__ import annotations

import ctypes
import gc
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

import cutemoe
from cutemoe.gdn import api as gdn_api
from cutemoe.gemm import api as gemm_api
from cutemoe.moe import api as moe_api
from cutemoe.runtime import capture, driver, recall, replay
from cutemoe.runtime.backend import Backend
from tests import strategies as draw
from tests.close import assert_same
from tests.gdn.cases import Case
from tests.moe.cases import Target, random_layer
from tests.runtime.fake_driver import FakeDriver, Launched, fake

__all__ = ["fake"]


class Call(NamedTuple):
    """Tensors in three roles."""

    x: torch.Tensor
    w: torch.Tensor
    scratch: torch.Tensor


def call_of(seed: int) -> Call:
    scratch = torch.zeros(128 + seed, dtype=torch.uint8)[seed:]
    return Call(torch.full((4, 8), float(seed)), torch.full((2,), seed + 0.5), scratch)


def kernel(fake: FakeDriver, *args: Any, **attributes: int) -> None:
    """A launcher of its own: a tensor is its address, its shape and what the stack had there."""
    parameters = []
    for x in capture.distinct(args):
        words = (x.data_ptr(), *x.shape, 7)
        parameters.append(b"".join(n.to_bytes(8, "little") for n in words))
    parameters.append((3).to_bytes(4, "little"))
    numbers = {int(name[1:]): value for name, value in attributes.items()}
    fake.submit(11, (2, 1, 1, 64, 1, 1, 0), parameters, numbers)


def run(fake: FakeDriver, t: Call) -> None:
    """Two launches, with a part of the scratch memory as it is and as numbers."""
    part = t.scratch[16:48].view(torch.float32).view(2, 4)
    replay.call(partial(kernel, fake, _6=1, _14=0), t.x, (part, (t.w, 3)), "word")
    pointers = b"".join(a.data_ptr().to_bytes(8, "little") for a in (part, t.x))
    addresses = ((0, (part,)), (8, (t.x,)))
    launch = driver.Launch(ctypes.c_void_p(12), (1, 2, 3, 32, 1, 1, 9), pointers, addresses)
    if not replay.noted(lambda: launch):
        fake.submit(12, launch.sizes, [pointers], {})


def launches(fake: FakeDriver, make: Callable[[], None]) -> list[Launched]:
    fake.launches.clear()
    make()
    return list(fake.launches)


def again(made: Any, t: Call) -> Callable[[], None]:
    return lambda: made(t, [x.data_ptr() for x in t])


def test_nothing_is_launched_while_it_is_recorded(fake: FakeDriver) -> None:
    t = call_of(16)
    assert replay.replayed(partial(run, fake, t), t) is not None
    assert not fake.launches and fake.destroyed == 1


def test_other_tensors_take_the_roles(fake: FakeDriver) -> None:
    first = call_of(0)
    made = replay.replayed(partial(run, fake, first), first)
    for seed in (0, 16, 16, 32):
        t = call_of(seed)
        want = launches(fake, partial(run, fake, t))
        assert len(want) == 2 and want[0].attributes == {6: 1, 14: 0}
        assert launches(fake, again(made, t)) == want


def test_a_tensor_of_nobody_is_not_replayed(fake: FakeDriver) -> None:
    t = call_of(16)
    copies = partial(replay.call, partial(kernel, fake), t.x.clone())
    assert replay.replayed(copies, t) is None


def test_what_two_roles_share_is_not_replayed(fake: FakeDriver) -> None:
    one = call_of(16)
    twice = one._replace(w=one.x)
    assert replay.replayed(partial(run, fake, twice), twice) is None
    # neighbours in one storage: whose is a view of it?
    both = torch.zeros(8, 8)
    sides = Call(both[:4], both[4:], one.scratch)
    launcher = partial(kernel, fake)
    assert replay.replayed(partial(replay.call, launcher, sides.x[1:]), sides) is None
    made = replay.replayed(partial(replay.call, launcher, sides.x, sides.w), sides)
    t = Call(torch.zeros(4, 8), torch.zeros(4, 8), one.scratch)
    assert launches(fake, again(made, t)) == launches(fake, partial(launcher, t.x, t.w))
    # two tensors of the same address, of which only one has a role
    far = Call(both[:4], one.w, both[:2])
    assert replay.replayed(partial(replay.call, launcher, far.x, far.scratch), far) is None


def test_recorded_tensors_are_not_kept(fake: FakeDriver) -> None:
    t = call_of(16)
    made = replay.replayed(partial(run, fake, t), t)
    alive = [weakref.ref(x.untyped_storage()) for x in t]
    del t
    gc.collect()
    assert made is not None and not any(ref() for ref in alive)


def test_threads_launch_from_memory_of_their_own(
    fake: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one is in the driver, another writes its addresses."""
    first = call_of(0)
    made = replay.replayed(partial(run, fake, first), first)
    calls = [call_of(seed) for seed in range(16, 144, 16)]
    want = [x for t in calls for x in launches(fake, partial(run, fake, t))]
    inside, real = threading.Barrier(len(calls)), fake.cuLaunchKernelEx

    def slow(*args: Any) -> int:
        inside.wait()
        return real(*args)

    monkeypatch.setattr(fake, "cuLaunchKernelEx", slow)
    threads = [threading.Thread(target=again(made, t)) for t in calls]
    fake.launches.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(fake.launches, key=str) == sorted(want, key=str)


def test_other_threads_launch_while_one_records(fake: FakeDriver) -> None:
    with replay.recording() as noted:
        thread = threading.Thread(target=run, args=(fake, call_of(16)))
        thread.start()
        thread.join()
    assert not noted and len(fake.launches) == 2


def test_a_launcher_that_fails_is_not_replayed(
    fake: FakeDriver, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("not while capturing")

    t = call_of(16)
    assert replay.replayed(partial(replay.call, fails, t.x), t) is None
    assert "not while capturing" in caplog.text


def test_an_error_ends_a_recording(fake: FakeDriver) -> None:
    def fails() -> None:
        raise ValueError

    t = call_of(16)
    with pytest.raises(ValueError):
        replay.replayed(fails, t)
    assert len(launches(fake, partial(run, fake, t))) == 2


def test_fixed_launches_keep_their_tensors(fake: FakeDriver) -> None:
    """With what their scratch memory was at first, whatever other calls do."""
    first, other = call_of(16), call_of(32)
    made = replay.replayed(partial(run, fake, first), first)
    want = launches(fake, partial(run, fake, first))
    step = replay.fixed(made, first)
    assert isinstance(step, replay.Fixed)
    alive = weakref.ref(first.x.untyped_storage())
    del first
    for _ in range(2):
        assert launches(fake, step) == want
        assert launches(fake, again(made, other)) != want
    gc.collect()
    assert alive() is not None
    nbytes = other.scratch.numel()
    scratched = replay.with_scratch(made, nbytes, torch.device("cpu"))
    step = replay.fixed(scratched, other[:2])
    assert launches(fake, step) == launches(fake, step) and len(fake.launches) == 2


def test_an_empty_grid_is_not_launched(fake: FakeDriver) -> None:
    t = call_of(16)
    launch = driver.Launch(ctypes.c_void_p(1), (0, 1, 1, 32, 1, 1, 0), bytes(8), ((0, (t.x,)),))
    made = replay.Replay.of([launch], t, 0)
    assert launches(fake, again(made, t)) == []


def two_launches(fake: FakeDriver, *args: Any) -> None:
    kernel(fake, *args)
    kernel(fake, *args)


def without_its_tensors(fake: FakeDriver, *args: Any) -> None:
    kernel(fake, args[0])


@pytest.mark.parametrize("refused", ["begin", "edges", "kernels"])
def test_a_driver_that_does_not_say(refused: str, fake: FakeDriver) -> None:
    fake.refuses.add(refused)
    t = call_of(16)
    assert capture.launch_of(partial(kernel, fake), (t.x,)) is None
    assert fake.destroyed == (refused != "begin") and fake.nodes is None


@pytest.mark.parametrize(
    "launcher",
    [
        two_launches,
        without_its_tensors,
        partial(kernel, _2=1),
        partial(kernel, _4=2),
    ],
    ids=["two launches", "a tensor that is not passed", "cooperative", "clusters"],
)
def test_a_launch_that_is_more_than_its_parameters(launcher: Any, fake: FakeDriver) -> None:
    t = call_of(16)
    assert capture.launch_of(partial(launcher, fake), (t.x, t.w)) is None
    assert capture.launch_of(partial(kernel, fake, _2=0, _4=1), (t.x, t.w)) is not None


def test_an_empty_tensor_has_no_address(fake: FakeDriver) -> None:
    t = call_of(16)
    found = capture.launch_of(partial(kernel, fake), (t.x, torch.empty(0)))
    assert found is not None and [len(tensors) for _, tensors in found.addresses] == [1]


class Pair(NamedTuple):
    a: torch.Tensor
    n: int


@dataclass(frozen=True)
class Whole:
    pair: Pair
    b: torch.Tensor | None
    more: tuple[Any, ...]


def test_values_are_rebuilt_from_other_tensors() -> None:
    a, b, c, d = (torch.full((2,), float(n)) for n in range(4))
    made = replay.rebuilt(Whole(Pair(a, 3), None, (b, "word", (c,))), [b, a, c])
    found = made([d, a, b])
    assert found.pair.a is a and found.more[0] is d and found.more[2][0] is b
    assert (found.pair.n, found.b, found.more[1]) == (3, None, "word")
    for roles in ([a, b], [a, b, c, c]):
        with pytest.raises(LookupError):
            replay.rebuilt(Pair(c, 1), roles)


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


def routings() -> list[Any]:
    logits = [draw.normal((70, 12), seed).cuda() for seed in (1, 2, 3)]
    return [partial(cutemoe.route, x, 3) for x in logits]


CALLS = {
    "routing": routings,
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
def test_recalled_calls_have_the_bits_of_checked_ones(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a card, in a CUDA graph too."""
    if "cute" in name:
        pytest.importorskip("cutlass")
    memories = (
        moe_api._KNOWN,
        moe_api._ROUTED,
        gemm_api._KNOWN,
        gdn_api._DECODED,
        gdn_api._VERIFIED,
    )

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
        for call in calls[: recall.CALLS]:
            call()
        # what is not replayed runs
        monkeypatch.delattr(Backend, "run")
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
