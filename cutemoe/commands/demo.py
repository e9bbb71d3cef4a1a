"""`cutemoe demo`: layers of real models on every back end of this machine, checked and timed."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch

from cutemoe.commands.cases import Case, full_size, small_size
from cutemoe.commands.clock import GraphClock, Rates
from cutemoe.commands.table import table
from cutemoe.errors import Unsupported
from cutemoe.runtime.compile import build_count, build_seconds, load_count, load_seconds
from cutemoe.runtime.device import Device

REFERENCE = "reference"
SEED = 0


@dataclass(frozen=True)
class Row:
    """One case on one back end; `problem` says why it is not ok."""

    operation: str
    case: str
    backend: str
    error: float | None = None
    bound: float | None = None
    ok: bool = False
    us: float | None = None
    percent_of_roof: float | None = None
    problem: str = ""


@dataclass(frozen=True)
class Refusal:
    """A back end that does not run a case here."""

    operation: str
    case: str
    backend: str
    reason: str


def run(as_json: bool = False) -> int:
    """Prints the table of every row; 1 if one of them is wrong, else 0."""
    started = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    with torch.no_grad():
        clock = GraphClock(device) if device.type == "cuda" else None
        rates = clock.rates() if clock else None
        found: list[Row | Refusal] = []
        for make, wanted in plan(device):
            _say(as_json, f"{len(found)} rows, {time.perf_counter() - started:.0f} s")
            found += measured(make, wanted, clock, rates)
    rows = [f for f in found if isinstance(f, Row)]
    refusals = [f for f in found if isinstance(f, Refusal)]
    seconds = time.perf_counter() - started
    if as_json:
        print(json.dumps(report(device, rows, refusals, rates, seconds)))
    else:
        _say(as_json, "")
        print(text(device, rows, refusals, rates, seconds))
    return 0 if rows and all(row.ok for row in rows) else 1


def plan(device: torch.device) -> Iterator[tuple[Callable[[], Case], Callable[[str], bool]]]:
    """Cases with the back ends that may run them: an interpreter gets small ones only."""
    interprets = Device.of(device).interprets
    for make in full_size(device):
        yield make, lambda name: name == REFERENCE or not interprets
    if interprets:
        for make in small_size(device):
            yield make, lambda name: name != REFERENCE


def measured(
    make: Callable[[], Case],
    wanted: Callable[[str], bool],
    clock: GraphClock | None,
    rates: Rates | None,
) -> Iterator[Row | Refusal]:
    """Rows of one case; whatever is raised becomes a row that is not ok."""
    try:
        case = make()
        reasons = case.explain().reasons
    except Exception as e:
        yield Row("-", "-", "-", problem=f"no case could be made, {type(e).__name__}: {e}")
        return
    for reason in reasons:
        if reason.reason is not None:
            yield Refusal(case.op, case.title, reason.name, reason.reason)
        elif wanted(reason.name):
            try:
                yield _row(case, reason.name, clock, rates)
            except Unsupported as e:
                yield Refusal(case.op, case.title, reason.name, str(e))
            except Exception as e:
                problem = f"{type(e).__name__}: {e}"
                yield Row(case.op, case.title, reason.name, problem=problem)


def _row(case: Case, backend: str, clock: GraphClock | None, rates: Rates | None) -> Row:
    verdict = case.check(backend)
    us = percent = None
    # the reference asks the device which experts are active, so no graph can hold it
    if clock and rates and verdict.ok and backend != REFERENCE:
        us = clock.us(case.calls(backend))
        percent = 100.0 * rates.floor_us(case.work) / us
    problem = "" if verdict.ok else "the error is over its bound"
    return Row(
        case.op,
        case.title,
        backend,
        verdict.error,
        verdict.bound,
        verdict.ok,
        us,
        percent,
        problem,
    )


def report(
    device: torch.device,
    rows: list[Row],
    refusals: list[Refusal],
    rates: Rates | None,
    seconds: float,
) -> dict[str, Any]:
    """Everything as plain data; a number that is none becomes null."""

    def plain(row: Row) -> dict[str, Any]:
        values = asdict(row)
        for name in ("error", "bound"):
            if values[name] is not None and not math.isfinite(values[name]):
                values[name] = None
        return values

    return {
        "device": str(Device.of(device)),
        "rows": [plain(row) for row in rows],
        "refused": [asdict(r) for r in refusals],
        "ceilings": asdict(rates) if rates else None,
        "kernels": {
            "compiled": build_count(),
            "seconds": round(build_seconds(), 3),
            "loaded": load_count(),
            "load_seconds": round(sum(load_seconds()), 3),
        },
        "seconds": round(seconds, 1),
        "ok": bool(rows) and all(row.ok for row in rows),
    }


def text(
    device: torch.device,
    rows: list[Row],
    refusals: list[Refusal],
    rates: Rates | None,
    seconds: float,
) -> str:
    """The table with what has to be said below it."""
    titles = ["operation", "case", "back end", "error", "bound", "result"]
    titles += ["us", "roof"] if rates else []
    body = [_cells(row, rates is not None) for row in rows]
    parts = [f"cutemoe on {Device.of(device)}", table(titles, body, right="error bound us roof")]
    notes = [
        "error: worst difference from float64, over the rms of the exact result. bound: twice the",
        "error of eager torch in the same dtypes, and one unit in the last place.",
    ]
    if rates:
        notes.append(
            f"us: CUDA graph, cold buffers, routing included. roof: share of what this card reads "
            f"({rates.read_tb_s:.2f} TB/s), copies ({rates.copy_tb_s:.2f} TB/s) or multiplies "
            f"({rates.bf16_tflop_s:.0f} bf16 TFLOP/s), measured just now."
        )
    elif device.type == "cpu":
        notes.append("No GPU: nothing is timed.")
    parts.append("\n".join(notes))
    if failed := [row for row in rows if not row.ok]:
        lines = [f"  {r.operation} {r.backend}, {r.case}: {r.problem}" for r in failed]
        parts.append("\n".join(["FAIL:", *lines]))
    if refused := _refusal_lines(refusals):
        parts.append("\n".join(["Not run here:", *refused]))
    good = sum(row.ok for row in rows)
    kernels = f"{build_count()} kernels compiled in {build_seconds():.1f} s, {load_count()} loaded"
    parts.append(f"{good} of {len(rows)} rows ok in {seconds:.0f} s; {kernels}")
    return "\n\n".join(parts)


def _cells(row: Row, timed: bool) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    cells = [
        row.operation,
        row.case,
        row.backend,
        number(row.error, ".1e"),
        number(row.bound, ".1e"),
        "ok" if row.ok else "FAIL",
    ]
    if timed:
        percent = "-" if row.percent_of_roof is None else f"{row.percent_of_roof:.0f} %"
        cells += [number(row.us, ".1f"), percent]
    return cells


def _refusal_lines(refusals: list[Refusal]) -> list[str]:
    """A line a back end and reason, with the operations it holds for."""
    operations: dict[tuple[str, str], list[str]] = {}
    for r in refusals:
        known = operations.setdefault((r.backend, r.reason), [])
        if r.operation not in known:
            known.append(r.operation)
    return [f"  {name} ({', '.join(ops)}): {why}" for (name, why), ops in operations.items()]


def _say(as_json: bool, progress: str) -> None:
    """Progress on a terminal's last line, nothing elsewhere."""
    if not as_json and sys.stderr.isatty():
        with contextlib.suppress(OSError):
            print(f"\r\033[K{progress}", end="", file=sys.stderr, flush=True)
