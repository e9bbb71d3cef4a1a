"""Times a case: a CUDA graph of several calls on different buffers, inputs redrawn between replays.

Decision: one graph of several calls, timed with events around one replay. Rejected: timing eager
calls (Python costs more than a kernel of 5 us), and replaying one call on the same weights (small
layers would stay in L2 and beat memory bandwidth).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from roofline import Work

from cutemoe.commands.oracle import Verdict

COLD_BYTES = 256 << 20
WARM_S = 0.15
MIN_SAMPLES = 15
MAX_SAMPLES = 200

Replay = Callable[[], None]


class Refused(RuntimeError):
    """The case computes something else than the reference; nothing may be recorded."""


@dataclass(frozen=True)
class Timing:
    """Microseconds a call over replays: 20th, 50th and 80th percentile."""

    us_p20: float
    us_p50: float
    us_p80: float
    samples: int


@dataclass(frozen=True)
class Measured:
    """A timing with the gate before it and the mean unavoidable work of the replays."""

    timing: Timing
    verdict: Verdict
    work: Work


class Case(Protocol):
    """Calls that can be captured, checked and redrawn."""

    calls: int

    def body(self) -> None:
        """Runs `calls` calls."""
        ...

    def refresh(self) -> None:
        """Redraws their inputs, on the device."""
        ...

    def check(self) -> Verdict:
        """Compares a call with float64."""
        ...

    def work(self) -> Work:
        """Unavoidable work of a call, mean over the last replay."""
        ...

    def confirm(self) -> str | None:
        """What the replays did wrong, or None."""
        ...


class Timer(Protocol):
    """Turns a body into something to replay, and times one replay in microseconds."""

    name: str

    def capture(self, body: Callable[[], None]) -> Replay:
        """Something that runs the body again."""
        ...

    def time(self, replay: Replay) -> float:
        """Microseconds of one replay."""
        ...


class GraphTimer:
    """CUDA graphs and events.

    Reading a gigabyte right before the first event lets the host run ahead of the device, so that
    the launch of the graph is not timed, and leaves nothing of the case in L2. A read, because
    written lines would be flushed on the case's time.
    """

    name = "cuda graph"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.curtain = torch.ones(1 << 28, dtype=torch.float32, device=device)
        self.start = torch.cuda.Event(enable_timing=True)
        self.end = torch.cuda.Event(enable_timing=True)

    def capture(self, body: Callable[[], None]) -> Replay:
        """The body as a graph; it ran twice before, so compilation is not captured."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            body()
            body()
        torch.cuda.current_stream(self.device).wait_stream(side)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            body()
        return graph.replay

    def time(self, replay: Replay) -> float:
        """Microseconds of one replay."""
        self.curtain.sum()
        self.start.record()
        replay()
        self.end.record()
        self.end.synchronize()
        return 1e3 * self.start.elapsed_time(self.end)


class WallTimer:
    """The host's clock around eager calls: exercises the method where there is no GPU.

    Its records are never reported.
    """

    name = "wall clock"

    def capture(self, body: Callable[[], None]) -> Replay:
        """The body itself, after one run."""
        body()
        return body

    def time(self, replay: Replay) -> float:
        """Microseconds of one run."""
        start = time.perf_counter()
        replay()
        return 1e6 * (time.perf_counter() - start)


def percentile(samples: Sequence[float], fraction: float) -> float:
    """The value below which a fraction of the samples lies, interpolated between neighbours."""
    ordered = sorted(samples)
    at = fraction * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def mean_work(works: Sequence[Work]) -> Work:
    """Mean of the works of several draws."""
    n = len(works)
    read, write, flops = (
        sum(getattr(w, f) for w in works) / n for f in ("read_bytes", "write_bytes", "flops")
    )
    return Work(read, write, flops, works[0].fp8)


def measure(
    case: Case,
    timer: Timer,
    *,
    seconds: float = 0.5,
    min_samples: int = MIN_SAMPLES,
    max_samples: int = MAX_SAMPLES,
) -> Measured:
    """Checks the case, captures it and times replays for about `seconds`.

    Raises:
        Refused: the gate before the timing failed, or the replays went wrong.
    """
    verdict = case.check()
    if not verdict.ok:
        raise Refused(f"error {verdict.error:.3g} of the output's rms, bound {verdict.bound:.3g}")
    replay = timer.capture(case.body)
    deadline = time.perf_counter() + WARM_S
    for _ in range(max_samples):
        case.refresh()
        timer.time(replay)
        if time.perf_counter() > deadline:
            break
    times: list[float] = []
    works: list[Work] = []
    deadline = time.perf_counter() + seconds
    while len(times) < min_samples or time.perf_counter() < deadline:
        case.refresh()
        times.append(timer.time(replay) / case.calls)
        if len(works) < min_samples:
            works.append(case.work())
        if len(times) >= max_samples:
            break
    if wrong := case.confirm():
        raise Refused(wrong)
    p20, p50, p80 = (percentile(times, f) for f in (0.2, 0.5, 0.8))
    return Measured(Timing(p20, p50, p80, len(times)), verdict, mean_work(works))


def copies(bytes_of_a_call: float, calls: int, bytes_of_a_set: float, memory: float) -> int:
    """How many buffer sets a rotation needs so that a set is cold when its turn comes.

    At least two, at most one a call, and never more than the memory holds.
    """
    need = math.ceil(COLD_BYTES / max(bytes_of_a_call, 1.0)) + 1
    return max(1, min(max(2, need), calls, int(memory // max(bytes_of_a_set, 1.0))))


def config_of(explanation: Any) -> dict[str, Any]:
    """The chosen configuration of `cutemoe.explain` as plain data."""
    config = explanation.config
    if config is None:
        return {}
    fields = getattr(config, "__dataclass_fields__", None)
    if fields is None:
        return {"config": str(config)}
    return {name: _plain(getattr(config, name)) for name in fields}


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if fields := getattr(value, "__dataclass_fields__", None):
        return {name: _plain(getattr(value, name)) for name in fields}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return str(value)
