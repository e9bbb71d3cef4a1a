"""One measurement as one json line, and back."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_FLOATS = (
    "us_p20",
    "us_p50",
    "us_p80",
    "tb_s",
    "tflop_s",
    "floor_us",
    "percent_of_floor",
    "error_vs_fp64",
    "bound",
)


@dataclass(frozen=True)
class Record:
    """A measurement, or with `error` set the reason why there is none.

    Attributes:
        workload, op, backend, batch: what ran.
        config: the configuration the back end chose, and the facts of the draw.
        us_p20, us_p50, us_p80: microseconds a call.
        tb_s, tflop_s: unavoidable bytes and operations over us_p50.
        floor_us, percent_of_floor: the roof of this draw and how much of it was reached.
        error_vs_fp64, bound: the gate before the timing, in units of the output's rms.
        ceilings: rates measured in the same run.
        timer: "cuda graph", or what stood in for it; only graphs are reported.
        device, clocks, versions, commit, date: where, with what, when.
        error: why the measurement was refused or failed.
    """

    workload: str
    op: str
    backend: str
    batch: int
    config: dict[str, Any] = field(default_factory=dict)
    us_p20: float | None = None
    us_p50: float | None = None
    us_p80: float | None = None
    tb_s: float | None = None
    tflop_s: float | None = None
    floor_us: float | None = None
    percent_of_floor: float | None = None
    error_vs_fp64: float | None = None
    bound: float | None = None
    samples: int = 0
    ceilings: dict[str, Any] = field(default_factory=dict)
    timer: str = ""
    device: str = ""
    clocks: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    date: str = ""
    error: str | None = None

    @property
    def timed(self) -> bool:
        """True where the record holds a time that may be reported."""
        return self.error is None and self.us_p50 is not None and self.timer == "cuda graph"

    def line(self) -> str:
        """The record as one line of json: five significant digits, null for what is no number."""
        values = dataclasses.asdict(self)
        for name in _FLOATS:
            if (v := values[name]) is not None:
                values[name] = float(f"{v:.5g}") if math.isfinite(v) else None
        return json.dumps(values, sort_keys=False, default=str)

    @staticmethod
    def parse(line: str) -> Record:
        """The record of one line.

        Raises:
            ValueError: not a json object, an unknown field, a missing one, or a wrong type.
        """
        values = json.loads(line)
        if not isinstance(values, dict):
            raise ValueError(f"expected a json object, got {type(values).__name__}")
        known = {f.name for f in dataclasses.fields(Record)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(f"unknown fields {', '.join(unknown)}")
        if missing := sorted({"workload", "op", "backend", "batch"} - values.keys()):
            raise ValueError(f"missing fields {', '.join(missing)}")
        for name in _FLOATS:
            if not isinstance(values.get(name), (int, float, type(None))):
                raise ValueError(f"{name}: expected a number, got {values[name]!r}")
        if not isinstance(values["batch"], int):
            raise ValueError(f"batch: expected an integer, got {values['batch']!r}")
        return Record(**values)


def read(paths: Iterable[Path]) -> Iterator[Record]:
    """Every record of the files, in order.

    Raises:
        ValueError: a line that is no record; the message has file and line number.
    """
    for path in paths:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.strip():
                try:
                    yield Record.parse(line)
                except ValueError as e:
                    raise ValueError(f"{path}:{number}: {e}") from e


def latest(records: Iterable[Record]) -> list[Record]:
    """Of each (device, workload, backend, batch) the newest timed record; ties go to the later."""
    newest: dict[tuple[str, str, str, int], Record] = {}
    for r in records:
        key = (r.device, r.workload, r.backend, r.batch)
        if r.timed and (key not in newest or r.date >= newest[key].date):
            newest[key] = r
    return list(newest.values())
