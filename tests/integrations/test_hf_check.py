"""perf/hf_check.py runs, on small layers and a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", "5.17")

ROOT = Path(__file__).parents[2]
SMALL = "--tiny --device cpu --seeds 1 --dtypes bf16 --layers 2 --prompt 6 --new 4 --batch 2"


def test_the_check_prints_a_line_for_every_comparison(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    found = [p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p]
    run = subprocess.run(
        [sys.executable, str(ROOT / "perf" / "hf_check.py"), *SMALL.split(), "--models", "gpt_oss",
         "--speed-batches", "1", "--out", str(out)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(found)},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    checks = [line["check"] for line in lines]
    assert checks == ["speed", "dense", "speed", "unpatched", "quantize", "quantized", "speed"]
    assert all(line["within_bound"] for line in lines if "within_bound" in line)
    assert all(line["decided_equal"] for line in lines if "decided_equal" in line)
    assert lines[3]["bits_equal"] is True
    assert set(lines[1]["parts_equal"]) == {"experts"}


def test_a_step_is_decided_where_roundings_cannot_change_the_token() -> None:
    sys.path.insert(0, str(ROOT / "perf"))
    from hf_check import Seen, decided

    nothing = torch.zeros(1, 4, dtype=torch.int64)
    want = torch.tensor([[[0.0, 1.0], [0.0, 0.5], [0.3, 0.0], [0.0, 1.0]]])
    off = torch.tensor([[[0.0, 0.2], [0.2, 0.0], [0.2, 0.1], [0.0, 0.0]]])
    # 0.5 is over 2 * 0.2, 0.3 is not, and nothing after a tie counts
    seen = Seen(nothing, nothing, want + off)
    assert decided(seen, want).tolist() == [[True, True, False, False]]
