"""Launches without Triton's launcher: the same specialisation, the right bytes, nothing missing."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

LAUNCHES = (
    "aligned",
    "ones",
    "unaligned",
    "wide",
    "floats",
    "none",
    "nested",
    "nested without",
)


@cache
def answer(what: str, folder: Path) -> dict:
    """What the worker says, with a cache of its own."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("launch_worker.py")), what],
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "CUTEMOE_NO_JIT": "0",
            "CUTEMOE_CACHE_DIR": str(folder),
            "CUTE_DSL_ARCH": "sm_90a",
            # nothing may be asked of a C compiler
            "PATH": "",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", LAUNCHES)
def test_arguments_are_specialised_as_triton_does(folder, name):
    ours, theirs = answer("specialise", folder)[name]
    assert ours == theirs


@pytest.mark.parametrize("name", LAUNCHES)
def test_the_driver_gets_the_right_bytes(folder, name):
    grid, threads, index, right, same, scratch = answer("pass", folder)[name]
    assert grid == [7, 2] and index == 0 and threads in (32, 128)
    assert right and same
    # two null pointers, to scratch memory that no kernel here uses
    assert scratch == 16


def test_what_is_compiled_ahead_is_all_that_a_layer_needs(folder):
    """Every batch of 1 to 4096 tokens, after the batches that `cutemoe compile` calls with."""
    found = answer("layer", folder)
    assert found["kernels"] >= 15 and found["more"] == 0


def test_and_all_that_gated_delta_nets_need(folder):
    pytest.importorskip("cutlass")
    found = answer("heads", folder)
    assert found["kernels"] >= 5 and found["more"] == 0


def test_a_missing_kernel_names_the_preset(tmp_path):
    said = answer("missing", tmp_path)["said"]
    assert len(said) == 4
    assert all("cutemoe compile --arch sm_90a --preset gpt-oss-20b" in s for s in said)


def test_a_stored_cute_kernel_takes_the_arguments_of_the_compiled_one(tmp_path):
    """Arguments on the CPU: each kernel refuses them with the same words, right ones by device."""
    pytest.importorskip("cutlass")
    found = answer("stored", tmp_path)
    compiled, kept, loaded = found["said"]
    assert compiled == kept == loaded and len(set(compiled)) > 1
    assert "device" in compiled[0] and "ran" not in compiled
    assert found["built"] == 1 and len(found["loaded"]) == 1
