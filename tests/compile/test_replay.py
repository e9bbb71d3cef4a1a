"""A recalled call launches what it would if it were checked, whatever tensors it has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")
WORKER = Path(__file__).with_name("replay_worker.py")
CASES = (
    *(f"layer {b} {a}" for b in ("cute", "triton") for a in ("bf16", "fp16", "fp8")),
    "layer triton nvfp4",
    "layer of many rows",
    "layer eager",
    "groups cute",
    "groups triton",
    *(f"heads cute {m}" for m in ("", "snapshots", "verify")),
    "heads ",
    "heads snapshots",
    "heads verify",
    "heads eager",
)


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By case: whether launches were recorded; those of a first, a recalled and a checked call."""
    folder = str(tmp_path_factory.mktemp("cache"))
    done = subprocess.run(
        [sys.executable, str(WORKER)],
        env={**os.environ, "TRITON_INTERPRET": "0", "CUTEMOE_CACHE_DIR": folder},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", CASES)
def test_the_launches_of_a_recalled_call_are_its_own(name: str, launches: dict[str, Any]) -> None:
    if "cute" in name:
        pytest.importorskip("cutlass")
    made, first, recalled, checked = launches[name]
    assert made == [True]
    assert recalled == checked and len(recalled) >= 1
    assert len(first) == len(recalled) and first != recalled


def test_what_cannot_be_told_apart_is_not_replayed(launches: dict[str, Any]) -> None:
    made, _, recalled, checked = launches["heads the same tensor twice"]
    assert made and not any(made) and recalled == checked
