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
def compiled(arch: int) -> dict[tuple[str, str], tuple[Compiled, list[str]]]:
    """Every call on one architecture, with the lanes its sums are taken in."""
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
        result = Compiled(f"gdn_{op}", arch, 1, ptx="", **answer["compiled"])
        found[op, name] = result, answer["sums"]
    return found


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("op", "name"), CALLS)
def test_no_spills(op, name, arch):
    c, _ = compiled(arch)[op, name]
    assert c.local_bytes == 0 and c.spills == 0 and c.count(r"LDL(\.\S+)?") == 0
    assert c.registers <= 255 and c.shared <= 4096
    # what torch's operators round, no multiply-add does not
    assert name != "eager" or c.count(r"FMUL(\S*)?") > 64


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["snapshots", "update"])
def test_wide_loads_and_few_shuffles(name, arch):
    """States move 16 bytes a lane; a sum over K takes 4 shuffles for 2 rows."""
    c, _ = compiled(arch)["decode", name]
    assert c.count(r"LDG\.\S*128\S*") >= 16
    assert c.count(r"STG\.\S*128\S*") >= 16
    # two sums for 16 rows, three over a key, two gates of 8 tokens, and the lanes of the output
    assert c.count(r"SHFL\.\S+") <= 2 * 4 * 8 + 3 * 5 + 2 * 3 + 8


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("decode", "verify"),
    [("snapshots", "few"), ("update", "many"), ("bf16 state", "bf16 state"), ("kv", "kv")],
)
def test_both_kernels_sum_in_the_same_lanes(decode, verify, arch):
    """Which lanes hold a row decides the order of its sums, and with it the bits of a state."""
    (lanes,) = compiled(arch)["decode", decode][1]
    assert compiled(arch)["verify", verify][1] == [lanes]
    assert compiled(arch)["decode", "snapshots"][1] == compiled(arch)["decode", "update"][1]
