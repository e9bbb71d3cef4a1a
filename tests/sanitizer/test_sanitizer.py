"""compute-sanitizer finds nothing: no stray access, race, unwritten read or broken barrier."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CALLS = Path(__file__).with_name("calls.py")
pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("group", ["moe", "gemm", "gdn"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_finds_nothing(tool, group):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # of torch's own kernels nothing is asked, nor of driver functions that are looked up while a
    # kernel is compiled, some of which a driver may lack
    command = [
        sanitizer, "--tool", tool, "--error-exitcode", "99",
        "--kernel-name-exclude", "kernel_substring=at::",
        *(["--report-api-errors", "no"] if tool == "memcheck" else []),
        sys.executable, str(CALLS), group,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "0 hazards" in done.stdout, done.stdout
