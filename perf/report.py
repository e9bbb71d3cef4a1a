"""Plots and the README table from perf/results/*.jsonl; no number is typed by hand.

`python perf/report.py` writes both; `--check` fails where the README is out of date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import record
from record import Record
from workloads import WORKLOADS, GemmWorkload, MoEWorkload

BEGIN, END = "<!-- perf:begin -->", "<!-- perf:end -->"
ROOT = Path(__file__).resolve().parents[1]
EMPTY = "No measurement is recorded yet: `python perf/run.py` makes one."
METHOD = (
    "Microseconds a call, and in brackets the percent of the floor: the bytes of the experts "
    "really drawn (states, for GDN) over the measured bandwidth, or the operations over the "
    "measured rate. CUDA graphs, cold buffers, routing inside and redrawn between replays, medians."
)
# families of workloads and what their batches count
UNITS = {"moe": "tokens", "gemm": "tokens", "gdn": "sequences"}

Rows = Mapping[tuple[str, str], Mapping[int, Record]]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python perf/report.py", description=__doc__)
    p.add_argument("--results", type=Path, default=ROOT / "perf" / "results")
    p.add_argument("--readme", type=Path, default=ROOT / "README.md")
    p.add_argument("--check", action="store_true", help="change nothing; 1 if README is stale")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Writes, or with --check compares; 0 if all is well."""
    args = parser().parse_args(argv)
    try:
        records = list(record.read(sorted(args.results.glob("*.jsonl"))))
        text = args.readme.read_text()
        wanted = replaced(text, section(records, _relative(args.results, args.readme)))
    except (ValueError, OSError) as e:
        print(f"report: {e}", file=sys.stderr)
        return 1
    if args.check:
        if wanted == text:
            return 0
        print(f"{args.readme} is out of date: run python perf/report.py", file=sys.stderr)
        return 1
    args.readme.write_text(wanted)
    for path in draw(records, args.results):
        print(path)
    for r in records:
        if r.error:
            print(f"not reported: {r.workload} B={r.batch} {r.backend}: {r.error}")
    return 0


def _relative(results: Path, readme: Path) -> str:
    """Where the README finds the plots."""
    try:
        return results.resolve().relative_to(readme.resolve().parent).as_posix()
    except ValueError:
        return results.as_posix()


def replaced(text: str, section: str) -> str:
    """The text with the section between its markers.

    Raises:
        ValueError: the markers are missing, or there are several.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"the README must hold {BEGIN} and {END} once, in this order")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{section}\n{END}{rest.split(END)[1]}"


def section(records: Sequence[Record], plots: str) -> str:
    """What stands between the markers: one block a device, newest measurement of every cell."""
    by_device: dict[str, list[Record]] = defaultdict(list)
    for r in record.latest(records):
        by_device[r.device].append(r)
    if not by_device:
        return EMPTY
    blocks = [METHOD]
    for device in sorted(by_device):
        found = by_device[device]
        blocks.append(f"**{device}**: {provenance(found)}")
        for family, title in UNITS.items():
            part = [r for r in found if family_of(r) == family]
            if part:
                blocks += [
                    table(rows_of(part), title),
                    f"![{title}]({plots}/{plot(family, device)})",
                ]
    return "\n\n".join(blocks)


def provenance(records: Sequence[Record]) -> str:
    """Ceilings, versions, commits and days behind some records, each by its range."""
    c = [r.ceilings for r in records]
    parts = [
        f"read {_span([x['read_tb_s'] for x in c])} TB/s",
        f"copy {_span([x['copy_tb_s'] for x in c])} TB/s",
        f"bf16 {_span([x['bf16_tflop_s'] for x in c])} TFLOP/s",
        f"empty graph node {_span([x['node_us'] for x in c])} us",
    ]
    names = ("torch", "triton", "driver")
    versions = [f"{n} {_list(r.versions.get(n, '?') for r in records)}" for n in names]
    days = _list(r.date[:10] for r in records)
    commits = _list(r.commit for r in records)
    return f"{', '.join(parts)}; {', '.join(versions)}; commit {commits}; {days}."


def _list(values: Iterable[str]) -> str:
    return ", ".join(sorted(set(values)))


def _span(values: Sequence[float]) -> str:
    low, high = short(min(values)), short(max(values))
    return low if low == high else f"{low} to {high}"


def family_of(r: Record) -> str:
    """A key of UNITS."""
    return "gdn" if r.op.startswith("gdn") else "gemm" if r.op == "grouped_gemm" else "moe"


def rows_of(records: Iterable[Record]) -> Rows:
    """Records by (workload, back end) and batch, in the order of WORKLOADS."""
    order = {name: i for i, name in enumerate(WORKLOADS)}
    rows: dict[tuple[str, str], dict[int, Record]] = defaultdict(dict)
    for r in sorted(records, key=lambda r: (order.get(r.workload, len(order)), r.backend, r.batch)):
        rows[r.workload, r.backend][r.batch] = r
    return rows


def table(rows: Rows, title: str) -> str:
    """A Markdown table: a line a workload and back end, a column a batch."""
    batches = sorted({b for cells in rows.values() for b in cells})
    lines = [
        f"| workload ({title}) | back end | " + " | ".join(map(str, batches)) + " |",
        "|---|---|" + "---|" * len(batches),
    ]
    for (workload, backend), cells in rows.items():
        values = [cell(cells[b]) if b in cells else "-" for b in batches]
        lines.append(f"| {describe(workload)} | {backend} | {' | '.join(values)} |")
    return "\n".join(lines)


def cell(r: Record) -> str:
    """Microseconds and percent of the floor."""
    if r.us_p50 is None or r.percent_of_floor is None:
        return "-"
    return f"{short(r.us_p50)} ({r.percent_of_floor:.0f} %)"


def short(value: float) -> str:
    """Three digits, never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def describe(name: str) -> str:
    """A workload with its shape, as the table calls it."""
    w = WORKLOADS.get(name)
    if isinstance(w, GemmWorkload):
        return f"`{name}` n{w.n} k{w.k} e{w.experts}, {w.weights} x {w.activations}"
    if not isinstance(w, MoEWorkload):
        return f"`{name}`"
    shape = f"h{w.hidden} i{w.intermediate} e{w.experts} k{w.top_k}"
    return f"`{name}` {shape}, {w.weights} x {w.activations}"


def plot(family: str, device: str) -> str:
    """File name of a plot."""
    return f"{family}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.svg"


def draw(records: Sequence[Record], folder: Path) -> list[Path]:
    """Writes a figure a device and family: one panel a workload, time and floor over the batch."""
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for r in record.latest(records):
        groups[family_of(r), r.device].append(r)
    written = []
    for (family, device), found in sorted(groups.items()):
        path = folder / plot(family, device)
        _figure(found, UNITS[family], device, path)
        written.append(path)
    return written


def _figure(records: Sequence[Record], unit: str, device: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "cutemoe"
    from matplotlib import pyplot

    panels = _panels(rows_of(records))
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(4.2 * across, 3.4 * down), squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, (title, lines) in zip(axes.flat, panels.items(), strict=False):
        for label, cells in lines.items():
            _line(ax, label, cells)
        ax.set(title=title, xscale="log", yscale="log", xlabel=unit, ylabel="us a call")
        ax.grid(True, which="both", alpha=0.2)
        ax.legend(fontsize="small")
    figure.suptitle(f"{device}: median and p20 to p80, floor dashed")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _panels(rows: Rows) -> dict[str, dict[str, Mapping[int, Record]]]:
    """Panels by title: of the GDN workloads all token counts share one."""
    panels: dict[str, dict[str, Mapping[int, Record]]] = defaultdict(dict)
    for (workload, backend), cells in rows.items():
        tokens = re.search(r"_t(\d+)_", workload)
        title = workload.replace(tokens[0], " ") if tokens else workload
        label = f"T={tokens[1]} {backend}" if tokens else backend
        panels[title][label] = cells
    return panels


def _line(ax: Any, label: str, cells: Mapping[int, Record]) -> None:
    batches = sorted(cells)
    p20, p50, p80, floor = (
        [getattr(cells[b], name) for b in batches]
        for name in ("us_p20", "us_p50", "us_p80", "floor_us")
    )
    (drawn,) = ax.plot(batches, p50, marker="o", markersize=3, label=label)
    ax.fill_between(batches, p20, p80, color=drawn.get_color(), alpha=0.2)
    ax.plot(batches, floor, linestyle="--", linewidth=1, color=drawn.get_color())


if __name__ == "__main__":
    sys.exit(main())
