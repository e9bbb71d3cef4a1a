"""The launches of a call, recorded once and made again with other tensors of the same signature.

What a call passes to its kernels is fixed by its signature (recall.py) but for addresses, while the
Python that finds kernels, grids and arguments takes 10 to 20 us a launch. So a back end whose work
is launches alone is run once without making any of them. What the driver would have been given is
kept, and where in it the addresses are: of which tensor of the call, how many bytes behind its
start. A launch is then these numbers, written into memory, and one call of the driver.

A tensor that comes from no tensor of the call, such as a copy made on the way, ends a recording:
the call is then not replayed.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from cutemoe.runtime import capture, driver
from cutemoe.runtime.driver import Launch

# makes a call again: its tensors in one order, and their addresses
Again = Callable[[Sequence[torch.Tensor], Sequence[int]], None]


class _Recording(threading.local):
    launches: list[Launch | None] | None = None


_RECORDING = _Recording()


@contextmanager
def recording() -> Iterator[list[Launch | None]]:
    """Inside, launches of this thread are noted and not made; None is one that cannot be."""
    before, _RECORDING.launches = _RECORDING.launches, []
    try:
        yield _RECORDING.launches
    finally:
        _RECORDING.launches = before


def noted(launch: Callable[[], Launch]) -> bool:
    """True where launches are recorded; the launch is then one of them."""
    if _RECORDING.launches is None:
        return False
    _RECORDING.launches.append(launch())
    return True


def call(kernel: Callable[..., None], *args: Any) -> None:
    """kernel(*args), one launch by a launcher of its own, args with tensors in nested tuples."""
    if _RECORDING.launches is None:
        kernel(*args)
    else:
        _RECORDING.launches.append(capture.launch_of(kernel, args))


class Replay:
    """Launches with other tensors in the roles of those that were recorded."""

    def __init__(
        self, launches: Sequence[tuple[Launch, Sequence[tuple[int, int, int]]]], index: int
    ) -> None:
        """Takes launches of a device, each with (offset of an address, role, bytes behind)."""
        self._launches = [x for x in launches if all(x[0].sizes[:3])]
        self.index = index
        # a launch is written into memory that no other thread writes to
        self._threads = threading.local()

    @staticmethod
    def of(
        launches: Sequence[Launch | None], roles: Sequence[torch.Tensor], index: int
    ) -> Replay | None:
        """The launches of a call with these tensors; None where one takes another tensor."""
        found = []
        for launch in launches:
            if launch is None:
                return None
            places = [(offset, _place(tensors, roles)) for offset, tensors in launch.addresses]
            if any(place is None for _, place in places):
                return None
            # nothing keeps the tensors
            bare = launch._replace(addresses=())
            found.append((bare, [(offset, *place) for offset, place in places if place]))
        return Replay(found, index)

    def __call__(self, tensors: Sequence[torch.Tensor], addresses: Sequence[int]) -> None:
        """Makes the launches; the tensors have to be alive until they were made."""
        try:
            blocks = self._threads.blocks
        except AttributeError:
            blocks = self._threads.blocks = [self._block(*x) for x in self._launches]
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        for words, moves, run, given in blocks:
            for at, role, behind in moves:
                words[at] = addresses[role] + behind
            words[driver.STREAM] = stream
            if code := run(*given):
                driver.again(run, given, code, self.index)

    def blocks(self, addresses: Sequence[int]) -> list[tuple[Any, ...]]:
        """Of every launch with these addresses its words, the driver's function, its arguments."""
        found = []
        for words, moves, run, given in [self._block(*x) for x in self._launches]:
            for at, role, behind in moves:
                words[at] = addresses[role] + behind
            found.append((words, run, given))
        return found

    @staticmethod
    def _block(launch: Launch, places: Sequence[tuple[int, int, int]]) -> tuple[Any, ...]:
        block = driver.Block(launch)
        moves = [(driver.PARAMETERS + offset // 8, *place) for offset, *place in places]
        return block.words, moves, driver.library().cuLaunchKernelEx, block.given


def _place(
    tensors: Sequence[torch.Tensor], roles: Sequence[torch.Tensor]
) -> tuple[int, int] | None:
    """In which role, and how many bytes behind its start, all of the tensors are; None where that
    is not certain."""
    found = {_role(t, roles) for t in tensors}
    return found.pop() if len(found) == 1 else None


def _role(t: torch.Tensor, roles: Sequence[torch.Tensor]) -> tuple[int, int] | None:
    same = [i for i, role in enumerate(roles) if role is t]
    if same:
        return (same[0], 0) if len(same) == 1 else None
    storage = t.untyped_storage()._cdata
    near = [i for i, role in enumerate(roles) if role.untyped_storage()._cdata == storage]
    if len(near) != 1:
        return None
    return near[0], t.data_ptr() - roles[near[0]].data_ptr()


def replayed(run: Callable[[], None], roles: Sequence[torch.Tensor]) -> Replay | None:
    """What does `run` with other tensors in these roles, or None.

    `run` must do nothing but launch kernels, through triton_kernels.launch or `call`.
    """
    with recording() as launches:
        run()
    return Replay.of(launches, roles, torch._C._cuda_getDevice())


class _WithScratch:
    """A call that gets one more tensor behind the others: so many bytes of new memory."""

    def __init__(self, again: Again, nbytes: int, device: torch.device) -> None:
        self.again, self.nbytes, self.device = again, nbytes, device

    def __call__(self, tensors: Sequence[torch.Tensor], addresses: Sequence[int]) -> None:
        scratch = self.scratch()
        self.again([*tensors, scratch], [*addresses, scratch.data_ptr()])

    def scratch(self) -> torch.Tensor:
        return torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)


def with_scratch(again: Again | None, nbytes: int, device: torch.device) -> Again | None:
    """The same with one more tensor behind the others: so many bytes of new memory."""
    return None if again is None else _WithScratch(again, nbytes, device)


def fixed(again: Again | None, tensors: Sequence[torch.Tensor]) -> Callable[[], None]:
    """A function that makes the call with these tensors, which it keeps, where they are now."""
    if again is None:
        return lambda: None
    if isinstance(again, _WithScratch):
        return fixed(again.again, [*tensors, again.scratch()])
    addresses = [t.data_ptr() for t in tensors]
    if isinstance(again, Replay):
        return Fixed(again, tensors, addresses)
    device = tensors[0].device
    if device.type != "cuda":
        return partial(again, tensors, addresses)

    def run() -> None:
        with torch.cuda.device(device):
            again(tensors, addresses)

    return run


class Fixed:
    """The launches of a Replay with the same tensors every time: nothing is written but the
    stream."""

    def __init__(
        self, replay: Replay, tensors: Sequence[torch.Tensor], addresses: Sequence[int]
    ) -> None:
        self._replay, self._tensors, self._addresses = replay, tensors, addresses
        self._index = replay.index
        self._threads = threading.local()

    def __call__(self) -> None:
        """Makes the launches on torch's current stream of their device."""
        try:
            blocks = self._threads.blocks
        except AttributeError:
            blocks = self._threads.blocks = self._replay.blocks(self._addresses)
        index = self._index
        if torch._C._cuda_getDevice() != index:
            with torch.cuda.device(index):
                self()
            return
        stream = torch._C._cuda_getCurrentRawStream(index)
        for words, run, given in blocks:
            words[driver.STREAM] = stream
            if code := run(*given):
                driver.again(run, given, code, index)


def rebuilt(value: Any, roles: Sequence[torch.Tensor]) -> Callable[[Sequence[torch.Tensor]], Any]:
    """A function from other tensors in these roles to what `value` is with these.

    Raises:
        LookupError: a tensor in it has no role, or several.
    """
    if isinstance(value, torch.Tensor):
        found = [i for i, t in enumerate(roles) if t is value]
        if len(found) != 1:
            raise LookupError(f"a tensor has {len(found)} roles")
        return lambda tensors: tensors[found[0]]
    if isinstance(value, tuple):
        parts = [rebuilt(v, roles) for v in value]
        make = getattr(value, "_make", tuple)
        return lambda tensors: make([part(tensors) for part in parts])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value) if f.init]
        fields = {name: rebuilt(getattr(value, name), roles) for name in names}
        return lambda tensors: dataclasses.replace(
            value, **{name: part(tensors) for name, part in fields.items()}
        )
    return lambda tensors: value
