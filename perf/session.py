"""One run: where it measures, what it may spend, what came of it."""

from __future__ import annotations

import dataclasses
import gc
import math
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import Measured, Timer
from record import Record
from roofline import Ceilings, floor_us
from workloads import GDNWorkload, Workload

import cutemoe

# seconds a case is expected to take before one of its kind has run
FIRST_CASE = 4.0


class DeviceLost(RuntimeError):
    """The device answers nothing any more; only a new process can go on."""


@dataclass
class Session:
    """State of a run.

    Attributes:
        facts: device, versions, commit and date of every record.
        clocks: reads the clocks of the device.
        out: file that gets one line a record.
        deadline: `time.monotonic()` after which no case starts.
        seconds: of samples a case.
        memory: bytes that copies of buffers may take.
        longest: seconds of the longest case so far, by op.
    """

    device: torch.device
    timer: Timer
    ceilings: Ceilings
    facts: Mapping[str, Any]
    clocks: Any
    out: Path
    deadline: float = math.inf
    seconds: float = 0.4
    memory: float = 60e9
    longest: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    records: int = 0
    errors: int = 0
    skipped: int = 0

    def say(self, text: str) -> None:
        """One line of progress."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)

    def fits(self, op: str) -> bool:
        """Whether a case as long as the longest of its op still fits."""
        return time.monotonic() + self.longest.get(op, FIRST_CASE) <= self.deadline

    def write(self, record: Record) -> None:
        """Appends a record; what was written stays, whatever happens later."""
        with self.out.open("a") as f:
            f.write(record.line() + "\n")
        self.records += record.error is None
        self.errors += record.error is not None

    def tidy(self) -> None:
        """Gives memory of finished cases back to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @contextmanager
    def case(self, w: Workload, backend: str, batch: int) -> Iterator[None]:
        """Runs one case: a refusal is skipped, anything else that is raised is recorded.

        Raises:
            DeviceLost: after recording the failure that lost the device.
        """
        label = f"{w.name} B={batch} {backend}"
        start = time.monotonic()
        try:
            yield
        except cutemoe.Unsupported as e:
            self.skipped += 1
            self.say(f"{label}: refused, {e}")
        except Exception as e:
            what = f"{type(e).__name__}: {e}"
            base = Record(w.name, w.op, backend, batch, timer=self.timer.name, **self.facts)
            self.write(dataclasses.replace(base, error=what[:2000]))
            self.say(f"{label}: FAILED, {what}")
            traceback.print_exc(limit=-3)
            self._check_device()
        taken = time.monotonic() - start
        self.longest[w.op] = max(self.longest.get(w.op, 0.0), taken)

    def _check_device(self) -> None:
        if self.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.device)
        except Exception as e:
            raise DeviceLost(str(e)) from e

    def finish(
        self, w: Workload, backend: str, batch: int, config: Mapping[str, Any], m: Measured
    ) -> None:
        """Writes and prints a measurement."""
        floor = floor_us(m.work, self.ceilings, matrix=not isinstance(w, GDNWorkload))
        us = m.timing.us_p50
        percent = 100.0 * floor / us
        record = Record(
            w.name,
            w.op,
            backend,
            batch,
            dict(config),
            **dataclasses.asdict(m.timing),
            tb_s=m.work.nbytes / us / 1e6,
            tflop_s=m.work.flops / us / 1e6,
            floor_us=floor,
            percent_of_floor=percent,
            error_vs_fp64=m.verdict.error,
            bound=m.verdict.bound,
            ceilings=self.ceilings.rounded(),
            timer=self.timer.name,
            clocks=self.clocks(),
            **self.facts,
        )
        self.write(record)
        self.say(
            f"{w.name} B={batch} {backend}: {us:.1f} us ({m.timing.us_p20:.1f}..."
            f"{m.timing.us_p80:.1f}), floor {floor:.1f}, {percent:.0f} %, "
            f"error {m.verdict.error:.2g} <= {m.verdict.bound:.2g}"
        )
