"""Every kind of gated delta net kernel compiles for every architecture, without a GPU."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from cutemoe.gdn import cute_plan
from cutemoe.gdn.cute_plan import Config
from cutemoe.gdn.problem import Problem
from cutemoe.runtime.device import Device
from tests.compile import limits
from tests.compile.cute_harness import worker

pytest.importorskip("cutlass")
H200 = Device("cuda", 0, "H200", 90, 132, 232448, True)
BUILD = "cutemoe.gdn.cute_build:build"
ARCHS = ("sm_80", "sm_90a", "sm_120a")
REAL = Problem(
    B=64, T=8, HQ=16, HV=32, DK=128, DV=128, slots=64, dtype="bfloat16", state="float32",
    gates="raw", layout="vk", indexed=True, qk_l2norm=True,
)  # fmt: skip
VERIFY = {"window": 8, "record": "bfloat16"}
KINDS: dict[str, dict[str, Any]] = {
    "out": {},
    "update": {"update": True},
    "update T=1": {"update": True, "T": 1},
    "out T=1, D=64": {"T": 1, "DK": 64, "DV": 64, "state": "bfloat16"},
    "kv T=1": {"layout": "kv", "update": True, "T": 1},
    "snapshots": {"snapshots": True, "T": 4},
    "slots": {"scattered": True, "T": 4},
    "slots, long": {"scattered": True, "T": 9, "state": "bfloat16"},
    "verify": VERIFY,
    "verify B=1": {**VERIFY, "B": 1},
    "verify T=4": {**VERIFY, "T": 4},
    "verify, float32 keys": {**VERIFY, "record": "float32"},
    "verify, long window": {**VERIFY, "window": 20},
    "verify T=4, ragged": {**VERIFY, "T": 4, "DV": 24},
    "verify T=4, given gates": {**VERIFY, "T": 4, "gates": "given", "qk_l2norm": False},
    "flush": {**VERIFY, "T": 0},
    "bf16 update": {"state": "bfloat16", "update": True},
    "bf16 verify": {**VERIFY, "state": "bfloat16"},
    "bf16 verify T=4": {**VERIFY, "state": "bfloat16", "T": 4},
    "bf16 verify, long window": {**VERIFY, "state": "bfloat16", "window": 20},
    "fp16 verify": {**VERIFY, "dtype": "float16", "record": "float16", "state": "float16"},
    "kv snapshots": {"layout": "kv", "snapshots": True, "update": True},
    "fp16 state, D=64, long": {"state": "float16", "DK": 64, "DV": 64, "T": 20, "update": True},
    "fp32 inputs": {"dtype": "float32", "T": 8, "update": True},
    "ragged": {"DV": 20, "update": True},
}


def configuration(kind: str, arch: str = "sm_90a") -> Config:
    """What is shipped for the kind of call, as complete as `cute_launch.complete` makes it."""
    problem = replace(REAL, **KINDS[kind])
    device = replace(H200, arch=int(arch.strip("sm_a")))
    config = cute_plan.configure(problem, device)
    accepted = "int32" if problem.record else ""
    targets = "int32" if problem.scattered else ""
    gates = (problem.dtype, problem.dtype, "float32", "float32")
    if problem.gates == "given":
        gates = ("float32", problem.dtype)
    return replace(
        config, gates=gates, accepted=accepted, targets=targets,
        wide=(True, problem.DV != 20, True, True),
    )  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_into_registers(kind, arch):
    config = configuration(kind, arch)
    c = worker().ask(BUILD, config, arch)
    assert c["local_bytes"] <= limits.local_bytes(f"{kind} {arch}") and c["registers"] <= 255
    if kind != "flush":
        assert bool(re.search(r"^(@!?U?P\w+ )?HMMA", c["sass"], re.MULTILINE)) == (config.tile > 1)
    assert not re.search(r"\b(BAR|LDS|STS)\b", c["sass"])
    if config.layout == "vk":
        assert re.search(r"LDG\S*\.128", c["sass"])
    if arch == "sm_90a" and not os.environ.get("CI"):
        print(f"{kind}: {c['registers']} registers, {c['seconds']:.2f} s")


@pytest.mark.parametrize("kind", ["verify", "verify T=4", "bf16 verify", "update", "bf16 update"])
def test_the_state_is_under_way_before_the_window_is_computed(kind):
    """ptxas moves the loads behind the window's products where it may: 0.8 us of a call."""
    sass = worker().ask(BUILD, configuration(kind), "sm_90a")["sass"].splitlines()
    loads = [i for i, line in enumerate(sass) if re.search(r"LDG\S*LTC128B\S*128", line)]
    products = [i for i, line in enumerate(sass) if "HMMA" in line]
    assert loads and max(loads) < min(products)


def test_misaligned_tensors_compile():
    config = replace(configuration("verify"), wide=(False,) * 4, blocks=0)
    assert worker().ask(BUILD, config, "sm_90a")["local_bytes"] == 0


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"DK": 96}, "DK 64 or 128, got 96"),
        ({"DV": 1}, "DV >= 2, got 1"),
        ({"B": 65536}, "B <= 65535"),
        ({"HV": 4096, "HQ": 16}, "HV * HV / HQ <= 65536"),
    ],
    ids=str,
)
def test_refusals(change, reason):
    assert reason in (cute_plan.refuse(replace(REAL, **change), H200) or "")


def test_what_real_models_need_is_not_refused():
    for change in KINDS.values():
        assert cute_plan.refuse(replace(REAL, **change), H200) is None


def test_head_of_q_without_a_division():
    """The kernel's hv * magic >> 16 is hv // group wherever `refuse` lets it run."""
    hv = torch.arange(2048)
    for group in range(1, 65):
        heads = hv[: min(2048, 65536 // group)]
        assert torch.equal(heads * -(-65536 // group) >> 16, heads // group)
