"""Recorded launches take the tensors of another call, or are not recorded at all."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any, NamedTuple

import torch

from cutemoe.runtime import replay


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
