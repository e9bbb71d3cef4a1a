"""The README table and the plots, from a small set of records."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import report
from record import Record

BASE = Record(
    "headline",
    "fused_moe",
    "triton",
    1,
    us_p20=55.0,
    us_p50=56.91,
    us_p80=58.0,
    floor_us=17.5,
    percent_of_floor=30.75,
    ceilings={"read_tb_s": 4.58, "copy_tb_s": 4.24, "bf16_tflop_s": 779.0, "node_us": 0.9},
    timer="cuda graph",
    device="NVIDIA H200",
    versions={"torch": "2.11.0", "triton": "3.6.0", "driver": "580.1"},
    commit="abc",
    date="2026-11-21T10:00:00Z",
)
RECORDS = [
    BASE,
    dataclasses.replace(BASE, batch=64, us_p50=919.4, floor_us=587.0, percent_of_floor=63.8),
    dataclasses.replace(BASE, backend="peer:other", us_p50=64.6),
    dataclasses.replace(BASE, workload="gdn_hv32_f32_t4_verify", op="gdn_verify", us_p50=5.678),
    dataclasses.replace(BASE, workload="gdn_hv32_f32_t8_verify", op="gdn_verify", us_p50=6.0),
    dataclasses.replace(BASE, workload="gpt_oss_20b", error="Refused: error 1", us_p50=None),
    dataclasses.replace(BASE, workload="qwen3_next", timer="wall clock"),
]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A README with markers and records in two files."""
    results = tmp_path / "perf" / "results"
    results.mkdir(parents=True)
    for name, part in (("a", RECORDS[:3]), ("b", RECORDS[3:])):
        (results / f"{name}.jsonl").write_text("".join(r.line() + "\n" for r in part))
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{report.BEGIN}\nformer text\n{report.END}\nafter\n")
    return tmp_path


def call(project: Path, *words: str) -> int:
    results = project / "perf" / "results"
    return report.main([f"--results={results}", f"--readme={project / 'README.md'}", *words])


def test_writes_table_and_plots_and_then_agrees_with_itself(project: Path, capsys) -> None:
    assert call(project, "--check") == 1
    assert "out of date" in capsys.readouterr().err
    assert call(project) == 0
    text = (project / "README.md").read_text()
    assert text.startswith("# Title") and text.endswith("after\n") and "former text" not in text
    assert "h4096 i2048 e256 k6, mxfp4 x bf16 | triton | 56.9 (31 %) | 919 (64 %) |" in text
    assert "| peer:other | 64.6 (31 %) | - |" in text
    assert "| `gdn_hv32_f32_t4_verify` | triton | 5.68 (31 %) |" in text
    assert "gpt_oss_20b" not in text and "qwen3_next" not in text
    assert "read 4.58 TB/s" in text and "commit abc; 2026-11-21" in text
    pictures = re.findall(r"\]\((perf/results/[^)]+\.svg)\)", text)
    assert len(pictures) == 2
    assert all((project / p).read_text().lstrip().startswith("<?xml") for p in pictures)
    assert call(project, "--check") == 0
    assert "not reported: gpt_oss_20b" in capsys.readouterr().out


def test_plots_are_reproducible(project: Path) -> None:
    results = project / "perf" / "results"
    first = [p.read_bytes() for p in report.draw(RECORDS, results)]
    assert first == [p.read_bytes() for p in report.draw(RECORDS, results)]


def test_a_changed_number_is_noticed(project: Path) -> None:
    assert call(project) == 0
    readme = project / "README.md"
    readme.write_text(readme.read_text().replace("56.9", "46.9"))
    assert call(project, "--check") == 1


def test_without_records_the_section_says_so(project: Path) -> None:
    for path in (project / "perf" / "results").glob("*.jsonl"):
        path.unlink()
    assert call(project) == 0
    assert report.EMPTY in (project / "README.md").read_text()


@pytest.mark.parametrize("text", ["no markers", f"{report.END}{report.BEGIN}", report.BEGIN * 2])
def test_markers_must_be_there_once(project: Path, text: str, capsys) -> None:
    (project / "README.md").write_text(text)
    assert call(project, "--check") == 1
    assert report.BEGIN in capsys.readouterr().err


def test_a_broken_line_is_an_error_with_its_place(project: Path, capsys) -> None:
    (project / "perf" / "results" / "a.jsonl").write_text("{}\n")
    assert call(project) == 1
    assert "a.jsonl:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"), [(5.678, "5.68"), (56.91, "56.9"), (919.4, "919"), (12345.6, "12346")]
)
def test_numbers_have_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert report.short(value) == text


def test_the_repository_is_up_to_date() -> None:
    if (
        not (report.ROOT / "README.md").exists()
        or report.BEGIN not in (report.ROOT / "README.md").read_text()
    ):
        pytest.skip("the README has no performance section")
    assert report.main(["--check"]) == 0
