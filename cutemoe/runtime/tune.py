"""Configurations that were measured: the shipped table, the user's own, and the search for them.

A table is a file for an architecture and a number of multiprocessors, so that what is compiled
ahead without a card is what runs on one. It has a row for an op, a shape and a size; a call takes
the row of its shape with the least size at or above its own, up to four times as large, and where
there is none the heuristic.

Rejected: tuning in the first call (it would stall serving, and ranks of a group would differ), the
nearest row (a tile too small for a batch reads weights twice), and timing before checking (a
candidate that computes nothing is fast).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch

from cutemoe.errors import InvalidCall
from cutemoe.runtime import settings
from cutemoe.runtime.device import Device

Shape = Mapping[str, Any]
Config = TypeVar("Config")
# from a configuration, others to try
Vary = Callable[[Any], Iterable[Any]]

SHIPPED = Path(__file__).parents[1] / "tuned"
# a row serves sizes down to this share of its own
REACH = 4
# a candidate must be faster by this share: less is noise
MARGIN = 0.01
_TRIED: list[Mapping[str, Any] | None] = []
_CLEAR: list[Callable[[], None]] = []


@dataclass(frozen=True)
class Tuning:
    """How a back end's configurations are searched.

    Attributes:
        key: problem -> shape and size of its row.
        passes: (problem, device) -> ways to vary a configuration, tried one after the other, each
            from the best so far.
        plain: configuration -> what a row holds of it.
    """

    key: Callable[[Any], tuple[Shape, int]]
    passes: Callable[[Any, Device], tuple[Vary, ...]]
    plain: Callable[[Any], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One measured configuration."""

    op: str
    shape: Shape
    size: int
    config: Mapping[str, Any]
    us: float


def file_of(folder: Path, device: Device) -> Path:
    """Where a folder keeps the table of a card."""
    return folder / f"{device.target}-{device.sm_count}.json"


def user_folder() -> Path | None:
    """The folder of the user's tables, beside the compiled kernels."""
    folder = settings.cache_dir()
    return None if folder is None else folder / "tuned"


def find(op: str, device: Device, shape: Shape, size: int) -> Mapping[str, Any] | None:
    """The configuration for a problem as plain data, or None where no row covers it."""
    if _TRIED:
        return _TRIED[-1]
    rows = _table(device).get(_name(op, shape), ())
    return next((row.config for row in rows if size <= row.size < REACH * size), None)


def on_change(clear: Callable[[], None]) -> None:
    """Has `clear` called whenever another configuration may be found."""
    _CLEAR.append(clear)


def kept(configure: Callable[[Any, Device], Config]) -> Callable[[Any, Device], Config]:
    """A function from problem and device to a configuration that remembers its answers."""
    cached = lru_cache(maxsize=1024)(configure)
    on_change(cached.cache_clear)
    return wraps(configure)(cached)


@contextmanager
def trying(config: Mapping[str, Any] | None) -> Iterator[None]:
    """Inside, every look-up in the table finds this configuration; None is the heuristic."""
    _TRIED.append(config)
    forget(tables=False)
    try:
        yield
    finally:
        _TRIED.pop()
        forget(tables=False)


def forget(*, tables: bool = True) -> None:
    """Reads tables again at the next call, after one has changed."""
    if tables:
        _table.cache_clear()
    for clear in _CLEAR:
        clear()


def search(
    start: Config,
    passes: Sequence[Callable[[Config], Iterable[Config]]],
    measure: Callable[[Config], float],
    *,
    seconds: float,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Config, dict[Config, float]]:
    """The fastest configuration found within the time, and microseconds of all that were right.

    Args:
        start: is measured first, whatever the time, and wins unless another is faster.
        measure: checks a configuration, then times it; raises where it is wrong or does not run.
        seconds: after which no further candidate is begun.

    Raises:
        InvalidCall: a CUDA graph is being captured.
        Exception: what `measure` raised for `start`.
    """
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise InvalidCall("tune: expected no CUDA graph capture, got one")
    deadline = time.monotonic() + seconds
    best, seen = start, {start: measure(start)}
    wrong: set[Config] = set()
    say(f"{seen[start]:.1f} us  {start}")
    for vary in passes:
        for config in vary(best):
            if config in seen or config in wrong:
                continue
            if time.monotonic() > deadline:
                say("no time left")
                return best, seen
            try:
                seen[config] = measure(config)
            except Exception as e:  # a candidate that fails only loses
                wrong.add(config)
                say(f"out, {type(e).__name__} {e}: {config}")
                continue
            say(f"{seen[config]:.1f} us  {config}")
        fastest = min(seen, key=seen.__getitem__)
        if seen[fastest] < seen[best] * (1.0 - MARGIN):
            best = fastest
    return best, seen


def write(path: Path, rows: Iterable[Row]) -> None:
    """Adds rows to a table; a row of the same op, shape and size is replaced."""
    held = {(_name(r.op, r.shape), r.size): r for r in _read(path)}
    held |= {(_name(r.op, r.shape), r.size): r for r in rows}
    lines = [
        json.dumps(
            {"op": r.op, "shape": dict(r.shape), "size": r.size, "config": r.config, "us": r.us}
        )
        for _, r in sorted(held.items(), key=lambda item: (str(item[0][0]), item[0][1]))
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    forget()


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    try:
        return [Row(**row) for row in json.loads(path.read_text())]
    except (ValueError, TypeError) as e:
        raise InvalidCall(f"{path}: expected a table that `cutemoe tune` wrote, got {e}") from e


def _name(op: str, shape: Shape) -> tuple[Any, ...]:
    return op, *sorted(shape.items())


@lru_cache(maxsize=8)
def _table(device: Device) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by op and shape, small sizes first; the user's stand in place of the shipped ones."""
    held: dict[tuple[Any, ...], dict[int, Row]] = {}
    for folder in (SHIPPED, user_folder()):
        for row in [] if folder is None else _read(file_of(folder, device)):
            held.setdefault(_name(row.op, row.shape), {})[row.size] = row
    return {name: [rows[size] for size in sorted(rows)] for name, rows in held.items()}
