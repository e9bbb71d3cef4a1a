"""The launches of a call, recorded once and made again with other tensors of the same signature.

What a call passes to its kernels is fixed by its signature (recall.py) but for addresses, while the
Python that finds kernels, grids and arguments takes 20 us a launch. So a back end whose work is
launches alone is run once without making any of them, and where each launch takes its tensors from
is noted: from which tensor of the call, how many bytes behind its start, and in what shape.

A tensor that comes from no tensor of the call, such as a copy made on the way, ends a recording:
the call is then not replayed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary


class Launch(NamedTuple):
    """A launch: `start` takes its tensors, or their addresses if it is by_address."""

    tensors: tuple[torch.Tensor, ...]
    start: Callable[[Sequence[Any]], None]
    by_address: bool


class _Recording(threading.local):
    launches: list[Launch] | None = None


_RECORDING = _Recording()


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Inside, launches of this thread are noted and not made."""
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
    """kernel(*args), args with tensors in nested tuples."""
    if _RECORDING.launches is None:
        kernel(*args)
        return
    tensors: list[torch.Tensor] = []
    build = _builder(args, tensors)
    _RECORDING.launches.append(
        Launch(tuple(tensors), lambda values: kernel(*build(values)), by_address=False)
    )


def _builder(args: tuple[Any, ...], tensors: list[torch.Tensor]) -> Callable[[Any], tuple]:
    """A function from values for the tensors of args, which are added to `tensors`, to args."""
    parts: list[tuple[int, Any]] = []
    for x in args:
        if isinstance(x, torch.Tensor):
            parts.append((_TENSOR, len(tensors)))
            tensors.append(x)
        elif isinstance(x, tuple):
            parts.append((_TUPLE, _builder(x, tensors)))
        else:
            parts.append((_CONSTANT, x))

    def build(values: Any) -> tuple:
        return tuple(
            [
                values[x] if kind == _TENSOR else x(values) if kind == _TUPLE else x
                for kind, x in parts
            ]
        )

    return build


_TENSOR, _TUPLE, _CONSTANT = range(3)
# of a view: dtype, shape, strides
_Form = tuple[torch.dtype, torch.Size, tuple[int, ...]]


class _Place(NamedTuple):
    """Of a launch's tensor: which of the call's it is, or lies in so many bytes behind its start;
    form is None where it is that tensor."""

    role: int
    behind: int
    form: _Form | None


class Replay:
    """Launches with the tensors of another call in their roles."""

    def __init__(self, launches: Sequence[tuple[Launch, Sequence[_Place]]]) -> None:
        # of every role that is viewed, its views
        self._views: dict[int, list[_Place]] = {}
        self._launches: list[tuple[Callable[[Sequence[Any]], None], bool, list[Any]]] = []
        for launch, places in launches:
            wanted: list[Any] = [(p.role, p.behind) for p in places]
            if not launch.by_address:
                wanted = [(p.role, self._number(p)) for p in places]
            self._launches.append((launch.start, launch.by_address, wanted))
        # of every such role, by the tensor that had it in an earlier call: its address and views
        self._made: dict[int, Any] = {role: WeakIdKeyDictionary() for role in self._views}

    def _number(self, place: _Place) -> int:
        """Which of its role's views a place is; -1 of the whole."""
        if place.form is None:
            return -1
        views = self._views.setdefault(place.role, [])
        if place not in views:
            views.append(place)
        return views.index(place)

    @staticmethod
    def of(launches: list[Launch], roles: Sequence[torch.Tensor | None]) -> Replay | None:
        """The launches of a call with these tensors; None where one takes another tensor."""
        found = []
        for launch in launches:
            places = [p for t in launch.tensors if (p := _place(t, roles)) is not None]
            if len(places) < len(launch.tensors):
                return None
            found.append((launch, places))
        return Replay(found)

    def __call__(self, roles: Sequence[torch.Tensor | None]) -> None:
        """Makes the launches."""
        addresses = [0 if t is None else t.data_ptr() for t in roles]
        views = {role: self._viewed(role, roles[role], addresses[role]) for role in self._views}
        for start, by_address, places in self._launches:
            if by_address:
                start([addresses[role] + behind for role, behind in places])
            else:
                start([roles[role] if n < 0 else views[role][n] for role, n in places])

    def _viewed(self, role: int, t: Any, address: int) -> list[torch.Tensor]:
        """The views of a tensor in a role."""
        known = self._made[role]
        found = known.get(t)
        # a tensor may be given other memory
        if found is None or found[0] != address:
            found = known[t] = address, [_view(t, place) for place in self._views[role]]
        return found[1]


def _view(t: torch.Tensor, place: _Place) -> torch.Tensor:
    """No view of torch, which would keep t alive, and so what is remembered of it."""
    dtype, shape, stride = place.form  # pyright: ignore
    start = t.storage_offset() * t.element_size() + place.behind
    view = torch.empty(0, dtype=dtype, device=t.device)
    return view.set_(t.untyped_storage(), start // dtype.itemsize, shape, stride)


def _place(t: torch.Tensor, roles: Sequence[torch.Tensor | None]) -> _Place | None:
    """Where a tensor comes from; None where that is not certain."""
    same = [i for i, role in enumerate(roles) if role is t]
    if same:
        return _Place(same[0], 0, None) if len(same) == 1 else None
    storage = t.untyped_storage()._cdata
    near = [
        i for i, role in enumerate(roles)
        if role is not None and role.untyped_storage()._cdata == storage
    ]  # fmt: skip
    if len(near) != 1:
        return None
    role: Any = roles[near[0]]
    return _Place(near[0], t.data_ptr() - role.data_ptr(), (t.dtype, t.shape, t.stride()))


def replayed(run: Callable[[Any], None], tensors: Any) -> Callable[[Any], None]:
    """What does `run` for tensors like these, whose `roles` lists every tensor in one order.

    `run` must do nothing but launch kernels, through triton_kernels.launch or `call`.
    """
    with recording() as launches:
        run(tensors)
    replay = Replay.of(launches, tensors.roles())
    return run if replay is None else lambda t: replay(t.roles())
