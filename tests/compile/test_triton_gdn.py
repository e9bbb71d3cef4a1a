"""The gated delta net kernels, cross-compiled as they would be launched: registers and SASS."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.compile.gdn_worker import DECODE, VERIFY
from tests.compile.harness import Compiled

CALLS = [*(("decode", name) for name in DECODE), *(("verify", name) for name in VERIFY)]
ARCHS = (80, 90, 100)


@cache
def compiled(arch: int) -> dict[tuple[str, str], Compiled]:
    """Every call on one architecture."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("gdn_worker.py")), str(arch)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for line in done.stdout.splitlines():
        op, name, answer = json.loads(line)
        found[op, name] = Compiled(f"gdn_{op}", arch, 1, ptx="", **answer)
    return found


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("op", "name"), CALLS)
def test_no_spills(op, name, arch):
    c = compiled(arch)[op, name]
    assert c.local_bytes == 0 and c.spills == 0 and c.count(r"LDL(\.\S+)?") == 0
    assert c.registers <= 255 and c.shared <= 4096


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["snapshots", "update"])
def test_wide_loads_and_few_shuffles(name, arch):
    """States move 16 bytes a lane; a sum over K takes 3 shuffles for 4 rows."""
    c = compiled(arch)["decode", name]
    rows = 8 if name == "snapshots" else 16
    assert c.count(r"LDG\.\S*128\S*") >= rows
    assert c.count(r"STG\.\S*128\S*") >= rows
    shuffles = c.count(r"SHFL\.\S+")
    # k q and two norms, two gates, and two sums for every 4 rows
    assert shuffles <= 3 * 3 + 2 * 3 + 2 * 3 * rows // 4 + 6, shuffles


@pytest.mark.parametrize("arch", ARCHS)
def test_keys_need_no_shared_memory(arch):
    """Keys and queries are loaded by the lanes that use them."""
    c = compiled(arch)["decode", "snapshots"]
    assert c.shared == 0 and c.count(r"BAR\S*") == 0
