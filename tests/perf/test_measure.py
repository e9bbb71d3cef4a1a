"""The control flow of a measurement, with a clock that is told what to say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import measure
import pytest
from hypothesis import given
from hypothesis import strategies as st
from measure import Refused, WallTimer, percentile
from roofline import Work

from cutemoe.commands.oracle import Verdict


class ScriptedTimer:
    """Replays run the body; the times are those given, again and again."""

    name = "scripted"

    def __init__(self, times: list[float]) -> None:
        self.times, self.count = times, 0

    def capture(self, body: Callable[[], None]) -> Callable[[], None]:
        return body

    def time(self, replay: Callable[[], None]) -> float:
        replay()
        self.count += 1
        return self.times[self.count % len(self.times)]


class CountingCase:
    """Remembers in which order it was asked for what."""

    calls = 4

    def __init__(self, error: float = 0.1, wrong: str | None = None) -> None:
        self.error, self.wrong = error, wrong
        self.log: list[str] = []

    def body(self) -> None:
        self.log.append("body")

    def refresh(self) -> None:
        self.log.append("refresh")

    def check(self) -> Verdict:
        self.log.append("check")
        return Verdict(self.error, 0.2)

    def work(self) -> Work:
        return Work(8.0 * self.log.count("refresh"), 0.0, 1.0)

    def confirm(self) -> str | None:
        self.log.append("confirm")
        return self.wrong


def test_checks_first_redraws_before_every_replay_and_confirms_last() -> None:
    case = CountingCase()
    m = measure.measure(case, ScriptedTimer([40.0]), seconds=0.0, max_samples=30)
    assert case.log[0] == "check" and case.log[-1] == "confirm"
    assert case.log[1:-1] == ["refresh", "body"] * ((len(case.log) - 2) // 2)
    assert m.timing == measure.Timing(10.0, 10.0, 10.0, measure.MIN_SAMPLES)
    assert m.verdict == Verdict(0.1, 0.2)


def test_work_is_the_mean_of_the_draws() -> None:
    case = CountingCase()
    m = measure.measure(case, ScriptedTimer([1.0]), seconds=0.0, max_samples=20)
    warm = case.log.count("refresh") - measure.MIN_SAMPLES
    assert m.work.read_bytes == pytest.approx(8.0 * (warm + (measure.MIN_SAMPLES + 1) / 2))


@pytest.mark.parametrize("error", [0.3, float("nan"), float("inf")])
def test_a_wrong_result_is_never_timed(error: float) -> None:
    case = CountingCase(error)
    with pytest.raises(Refused, match="bound"):
        measure.measure(case, ScriptedTimer([1.0]))
    assert case.log == ["check"]


def test_a_wrong_replay_is_refused() -> None:
    with pytest.raises(Refused, match="differ"):
        measure.measure(CountingCase(wrong="they differ"), ScriptedTimer([1.0]), seconds=0.0)


def test_wall_timer_counts_time() -> None:
    ran: list[int] = []
    replay = WallTimer().capture(lambda: ran.append(1))
    assert WallTimer().time(replay) >= 0.0 and len(ran) == 2


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50), st.floats(0, 1))
def test_percentile_lies_between_neighbours(samples: list[float], fraction: float) -> None:
    p = percentile(samples, fraction)
    assert min(samples) <= p <= max(samples)
    assert percentile(samples, 0.0) == min(samples) and percentile(samples, 1.0) == max(samples)


def test_percentile_of_an_even_count_is_between() -> None:
    assert percentile([4.0, 1.0, 2.0, 3.0], 0.5) == 2.5


@given(call=st.floats(1, 1e11), size=st.floats(1, 1e11), calls=st.integers(1, 64))
def test_copies_keep_buffers_cold_within_the_memory(call: float, size: float, calls: int) -> None:
    n = measure.copies(call, calls, size, 60e9)
    assert 1 <= n <= calls
    assert n == 1 or n * size <= 60e9
    roomy = measure.copies(call, calls, 0.0, 60e9)
    assert roomy == calls or (roomy - 1) * call >= measure.COLD_BYTES


@dataclass(frozen=True)
class Tile:
    m: int
    name: str = "a"


@dataclass(frozen=True)
class Config:
    tile: Tile
    warps: tuple[int, ...]


@dataclass(frozen=True)
class Explanation:
    config: object


def test_config_is_plain_data() -> None:
    found = measure.config_of(Explanation(Config(Tile(16), (4, 8))))
    assert found == {"tile": {"m": 16, "name": "a"}, "warps": [4, 8]}
    assert measure.config_of(Explanation(None)) == {}
    assert measure.config_of(Explanation("fast")) == {"config": "fast"}
