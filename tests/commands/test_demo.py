"""The demo on small cases, what it says when something is wrong, and once in full."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

import cutemoe
from cutemoe.commands import cases, clock, demo
from cutemoe.commands.clock import Rates, Work
from cutemoe.commands.oracle import Verdict
from cutemoe.runtime.device import Device

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo with small cases only, on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(demo, "full_size", cases.small_size)


def rows(out: str) -> list[dict[str, Any]]:
    return json.loads(out)["rows"]


def test_every_back_end_that_runs_here_is_right(small: None, capsys: Any) -> None:
    code = demo.run(as_json=True)
    found = rows(capsys.readouterr().out)
    wrong = [row for row in found if not row["ok"]]
    assert code == 0 and not wrong, wrong
    operations = {(row["operation"], row["backend"]) for row in found}
    assert {(op, "reference") for op in ("fused_moe", "gdn_decode", "gdn_verify")} <= operations
    if Device.of(CPU).interprets:
        assert ("fused_moe", "triton") in operations
    for row in found:
        assert 0 <= row["error"] <= row["bound"] and row["us"] is None


def test_refusals_are_listed_below_the_table(
    small: None, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert demo.run() == 0
    out = capsys.readouterr().out
    assert "\nNot run here:\n" in out
    assert "\n  triton (fused_moe, gdn_decode, gdn_verify): needs a CUDA" in out
    assert "4 of 4 rows ok" in out and "No GPU: nothing is timed." in out


def test_a_wrong_result_fails(small: None, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    real = cutemoe.gdn_decode
    monkeypatch.setattr(cutemoe, "gdn_decode", lambda *a, **k: real(*a, **k).mul_(1.1))
    assert demo.run() == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and "the error is over its bound" in out and "3 of 4 rows ok" in out


def test_a_back_end_that_raises_fails_and_the_rest_goes_on(
    small: None, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("boom")

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(cutemoe, "fused_moe", broken)
    assert demo.run(as_json=True) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["ok"]
    assert [row["ok"] for row in report["rows"]] == [False, False, True, True]
    assert report["rows"][0]["problem"] == "RuntimeError: boom"


def test_an_interpreter_gets_small_cases_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    wanted = [accepts for _, accepts in demo.plan(CPU)]
    assert [w("triton") for w in wanted] == [False] * 4 + [True] * 4
    assert [w("reference") for w in wanted] == [True] * 4 + [False] * 4


def test_json_of_an_error_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    row = demo.Row("op", "case", "triton", math.nan, 0.0)
    report = demo.report(CPU, [row], [], None, 1.0)
    assert report["rows"][0]["error"] is None and not report["ok"]
    json.dumps(report, allow_nan=False)


class TimedCase:
    """A case whose timing is known."""

    op, title = "fused_moe", "known"
    work = Work(4.0e6, 0.0, 0.0)

    def explain(self) -> Any:
        reasons = [cutemoe.runtime.backend.Reason(n, None) for n in ("triton", "reference")]
        return type("Explained", (), {"reasons": reasons})

    def check(self, backend: str) -> Verdict:
        return Verdict(0.1, 0.2)

    def calls(self, backend: str) -> list[Any]:
        return [lambda: torch.ones(1)]


def test_timed_rows_show_microseconds_and_the_share_of_the_roof() -> None:
    class Clock:
        def us(self, calls: Any) -> float:
            return 2.0

    rates = Rates(4.0, 4.0, 700.0)
    found: Any = list(demo.measured(TimedCase, lambda _: True, Clock(), rates))  # type: ignore[arg-type]
    assert [row.percent_of_roof for row in found] == [50.0, None]
    text = demo.text(CPU, found, [], rates, 1.0)
    assert "2.0  50 %" in text and "4.00 TB/s" in text


@pytest.mark.parametrize(
    ("work", "us"),
    [
        (Work(4.0e6), 1.0),
        (Work(1.0e6, 1.0e6), 1.0),
        (Work(5.0e6, 1.0e6), 2.0),
        (Work(4.0e6, 0.0, 1400e6), 2.0),
    ],
)
def test_the_roof(work: Work, us: float) -> None:
    assert Rates(4.0, 2.0, 700.0).floor_us(work) == pytest.approx(us)


def test_weights_have_about_unit_gain() -> None:
    for format in ("mxfp4", "nvfp4"):
        w = cases.random_weight((2, 64, 1024), format, CPU).dequantize()
        assert 0.5 < float(w.square().sum(-1).mean()) < 3.0


@pytest.mark.slow
def test_in_full(capsys: Any) -> None:
    assert demo.run(as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["seconds"] < 60
    assert any("gpt-oss-20b" in row["case"] for row in report["rows"])


@pytest.mark.gpu
def test_a_graph_is_timed() -> None:
    device = torch.device("cuda")
    x = torch.ones(1 << 26, device=device)
    us = clock.GraphClock(device).us([lambda: x * 2.0] * 3)
    # 512 MiB cannot move in less than 60 us on any card of today
    assert 60 < us < 10_000
