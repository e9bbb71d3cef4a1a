import dataclasses
import json
import math
from pathlib import Path

import pytest
import record
from hypothesis import given
from hypothesis import strategies as st
from record import Record

TIMED = Record(
    "headline",
    "fused_moe",
    "triton",
    64,
    {"block_m": 16},
    us_p20=700.0,
    us_p50=712.34,
    us_p80=730.0,
    tb_s=3.75,
    tflop_s=27.0,
    floor_us=587.0,
    percent_of_floor=82.4,
    error_vs_fp64=0.003,
    bound=0.006,
    samples=40,
    ceilings={"read_tb_s": 4.58, "copy_tb_s": 4.24, "bf16_tflop_s": 779.0, "node_us": 1.0},
    timer="cuda graph",
    device="NVIDIA H200",
    versions={"torch": "2.11.0"},
    commit="abc",
    date="2026-11-21T10:00:00Z",
)

numbers = st.none() | st.floats(0, 1e9, allow_nan=False)
words = st.text(max_size=20)


@given(
    us=numbers,
    floor=numbers,
    batch=st.integers(0, 10**6),
    config=st.dictionaries(words, st.integers() | words | st.booleans() | st.none()),
    error=st.none() | words,
)
def test_a_line_and_back(
    us: float | None, floor: float | None, batch: int, config: dict[str, object], error: str | None
) -> None:
    r = Record(
        "w", "op", "b", batch, config, us_p50=us, floor_us=floor, error=error, timer="cuda graph"
    )
    line = r.line()
    assert "\n" not in line
    back = Record.parse(line)
    assert dataclasses.replace(back, us_p50=us, floor_us=floor) == r
    for got, want in ((back.us_p50, us), (back.floor_us, floor)):
        assert got == want or math.isclose(got or 0.0, want or 0.0, rel_tol=1e-4)
    assert Record.parse(back.line()) == back


def test_numbers_that_are_none_become_null() -> None:
    line = dataclasses.replace(TIMED, error_vs_fp64=math.nan, bound=math.inf).line()
    back = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no json"))
    assert back["error_vs_fp64"] is None and back["bound"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, "unknown fields extra"),
        ({"us_p50": "fast"}, "us_p50"),
        ({"batch": "64"}, "batch"),
    ],
)
def test_parse_names_what_is_wrong(change: dict[str, object], message: str) -> None:
    line = json.dumps({**json.loads(TIMED.line()), **change})
    with pytest.raises(ValueError, match=message):
        Record.parse(line)


def test_read_says_where(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(TIMED.line() + "\n\n{}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:3: missing fields"):
        list(record.read([path]))


def test_latest_keeps_the_newest_graph_timing_of_every_cell() -> None:
    newer = dataclasses.replace(TIMED, us_p50=600.0, date="2026-11-22T00:00:00Z")
    failed = dataclasses.replace(TIMED, error="boom", date="2026-11-23T00:00:00Z")
    host = dataclasses.replace(TIMED, timer="wall clock", date="2026-11-23T00:00:00Z")
    other = dataclasses.replace(TIMED, batch=256)
    assert record.latest([newer, TIMED, failed, host, other]) == [newer, other]
