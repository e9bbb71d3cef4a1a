"""Every kernel of NVFP4 and MXFP4 layers compiles for SM90, SM120 and SM121, without a GPU."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cutemoe.errors import Unsupported
from cutemoe.moe import cute_nvfp4_plan as plan
from cutemoe.moe.cute_nvfp4_plan import FC2Config, FusedConfig, GemmConfig, Nvfp4Config, Tile
from cutemoe.moe.problem import Problem
from cutemoe.runtime.device import Device
from tests.compile import limits
from tests.compile.cute_harness import worker
from tests.compile.cute_nvfp4 import ask
from tests.compile.transplant import assembled, transplanted

pytest.importorskip("cutlass")
# the tools in Triton's wheel read SASS; those of 3.6 do not know sm_121
TRITON = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
ARCHS = ("sm_90a", "sm_120a", "sm_121a")[: 3 if TRITON > (3, 6) else 2]
NATIVE = {
    "nvfp4": "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X",
    "mxfp4": "OMMA.SF.16864.F32.E2M1.E2M1.E8",
}
REAL = Problem(
    tokens=1, hidden=4096, intermediate=2048, experts=256, top_k=8, gated=True, weight="nvfp4",
    group_size=16, layout="sm120_fp4", activations="nvfp4", dtype="bf16", gate_up="gate_up",
    activation="swiglu", per_expert_params=False, has_limit=False, has_b13=False, has_b2=False,
    static_scale=True, ids="int32", expert_offset=0, deterministic=True, rounding="fused",
)  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "decode": {},
    "batch": {"tokens": 1024},
    "prefill": {"tokens": 2048, "gate_up": "up_gate"},
    "long prefill": {"tokens": 8192, "has_limit": True, "has_b13": True, "has_b2": True},
    "relu2": {"tokens": 2048, "gated": False, "activation": "relu2"},
    "relu2 decode": {"gated": False, "activation": "relu2", "dtype": "fp16", "ids": "int64"},
    "geglu": {"tokens": 2048, "activation": "geglu", "gate_up": "interleaved"},
    "geglu tanh": {"tokens": 512, "activation": "geglu_tanh", "has_b13": True},
    "odd widths": {"hidden": 4112, "intermediate": 720, "tokens": 2048},
}
MXFP4 = {"weight": "mxfp4", "activations": "mxfp4", "group_size": 32, "static_scale": False}
# every tile has its scales in one way or the other; activations are those of nvfp4
TILES = ("decode", "batch", "prefill", "long prefill")
KINDS |= {f"mxfp4 {k}": {**KINDS[k], **MXFP4} for k in TILES}
KINDS["mxfp4 odd widths"] = {"hidden": 2912, "intermediate": 736, "tokens": 2048, **MXFP4}
W4A16 = {"activations": "bf16", "static_scale": False}
KINDS |= {f"w4a16 {k}": {**KINDS[k], **W4A16} for k in ("decode", "long prefill", "odd widths")}
KINDS["w4a16 relu2 decode"] = {**KINDS["relu2 decode"], **W4A16, "activations": "fp16"}
EMULATED = ("decode", "long prefill", "mxfp4 decode", "w4a16 decode", "w4a16 long prefill")
# registers a thread, by routed rows of a tile; the emulation holds decoded operands
MOST = {16: 104, 32: 104, 64: 136, 128: 176}


def configuration(kind: str, arch: str) -> Nvfp4Config:
    """What a card of this architecture would run."""
    number = int(arch.strip("sm_a"))
    device = Device("cuda", 0, arch, number, 132, plan.SMEM_LIMIT, True)
    problem = replace(REAL, **KINDS[kind])
    assert plan.refuse(problem, device) is None
    return plan.configure(problem, device)


def of_fc2(c: Nvfp4Config) -> FC2Config:
    return FC2Config(c.fc2, c.rows)


def count(c: dict[str, Any], opcode: str) -> int:
    return len(re.findall(rf"^(?:@!?U?P\w+ )?{opcode}\b", c["sass"], re.MULTILINE))


def cases(*kinds: str) -> list[tuple[str, str]]:
    """Kinds with architectures; sm_121a, with the instructions of sm_120a, only for the first.

    The emulation, which takes ptxas up to half a minute, for the smallest and largest tiles: a card
    that runs the tests compiles the others.
    """
    return [
        (k, a)
        for k in kinds
        for a in ARCHS
        if (a != "sm_121a" or k == kinds[0]) and (a != "sm_90a" or k in EMULATED)
    ]


@pytest.mark.parametrize(("kind", "arch"), cases(*KINDS))
def test_gemms_compile_into_the_instruction_meant(kind, arch):
    config = configuration(kind, arch)
    for build, c in (("build_fc1", config.fc1), ("build_fc2", config.fc2)):
        found = ask(build, c if build == "build_fc1" else of_fc2(config), arch)
        assert found["local_bytes"] == 0
        # copies of 8 bytes need twice the addresses
        most = MOST[c.tile.block_m] + (24 if c.vector == 8 else 0)
        most += limits.more_registers(c.tile.block_m) + (8 if c.numbers else 0)
        emulated = 176 if config.fc1.scaled or c.numbers else 255
        assert found["registers"] <= (most if arch != "sm_90a" else emulated)
        assert c.tile.smem_bytes <= plan.SMEM_LIMIT
        # one instruction for 16 rows, 8 rows of w and 64 codes of a stage
        tiles = c.tile.block_m // c.tile.warps_m // 16 * (plan.BLOCK_N // c.tile.warps_n // 8)
        steps = tiles * c.tile.block_k // 64
        if arch == "sm_90a" or c.numbers:
            assert count(found, r"OMMA\S*") == 0 and count(found, "HMMA") == 4 * steps
        else:
            assert (
                found["sass"].count(NATIVE["nvfp4" if c.scaled else "mxfp4"])
                == count(found, r"OMMA\S*")
                == steps
            )
            assert count(found, "HMMA") == 0
        assert count(found, r"LDGSTS\S*") > 0 and count(found, r"LDSM\S*") > 0
        # of numbers a lane takes 16 bytes at once
        assert (count(found, r"LDS\.128") >= 4 * c.tile.block_k // 64) == bool(c.numbers)
        assert not re.search(r"\b(UTMALDG|USETMAXREG|HGMMA)", found["sass"])
        print(f"{build} {kind} {arch}: {found['registers']} registers, {found['seconds']:.2f} s")


@pytest.mark.parametrize(
    ("kind", "arch"), cases("decode", "relu2 decode", "mxfp4 decode", "w4a16 decode")
)
def test_the_other_kernels_compile_without_local_memory(kind, arch):
    config = configuration(kind, arch)
    parts = (
        ("build_sort", config.sort),
        ("build_sort", replace(config.sort, flat=False)),
        ("build_quantise", config.rows),
        ("build_quantise", replace(config.rows, wide=False, flat=False)),
        ("build_fc2", FC2Config(config.fc2, replace(config.rows, wide=False))),
    )
    if config.fc1.numbers:
        parts = (*parts[4:], ("build_fc1", replace(config.fc1, wide=False)))
    # the emulation of mxfp4 holds decoded operands and two scales each
    gemm = 160 if arch == "sm_90a" and not config.fc1.scaled else 128
    for build, c in parts:
        found = ask(build, c, arch)
        assert found["local_bytes"] <= limits.local_bytes(build.removeprefix("build_"))
        assert found["registers"] <= (gemm if build in ("build_fc1", "build_fc2") else 64)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("kind", "arch"),
    cases(
        "decode",
        "batch",
        "prefill",
        "long prefill",
        "mxfp4 decode",
        "mxfp4 long prefill",
        "w4a16 decode",
        "w4a16 long prefill",
    ),
)
def test_a_layer_in_one_launch_compiles(kind, dynamic, arch):
    c = configuration(kind, arch)
    found = ask("build_fused", FusedConfig(c.sort, c.rows, c.fc1, of_fc2(c), dynamic), arch)
    assert found["local_bytes"] == 0
    assert found["registers"] <= (232 if c.fc1.scaled or c.fc1.numbers else 255)
    assert count(found, "HMMA" if arch == "sm_90a" or c.fc1.numbers else r"OMMA\S*") > 0
    assert count(found, r"ATOMG\S*|ATOM\S*|RED\S*") >= 4 + 2 * dynamic
    print(f"{kind} {dynamic} {arch}: {found['registers']} registers, {found['seconds']:.2f} s")


SHORT = ("mxfp4 long prefill", "build_fused")


@pytest.mark.parametrize(
    "kind", ["decode", "long prefill", "relu2", "mxfp4 decode", "mxfp4 long prefill"]
)
def test_the_ptx_of_sm120_assembles_for_sm90_without_its_fp4_instructions(kind):
    c = configuration(kind, "sm_120a")
    whole = FusedConfig(c.sort, c.rows, c.fc1, of_fc2(c))
    parts = {
        "build_quantise": c.rows,
        "build_fc1": c.fc1,
        "build_fc2": of_fc2(c),
        "build_fused": whole,
    }
    for build, config in parts.items():
        found = ask(build, config, "sm_120a")
        text, mmas, conversions = transplanted(found["ptx"])
        assert mmas == count(found, r"OMMA\S*")
        assert (conversions > 0) == (build != "build_fc2")
        assert not re.search(r"block_scale|e2m1|sm_120", text)
        # what stands for the MMA of mxfp4 holds more; in one launch it is a register short
        spilled = re.findall(r"(\d+) bytes spill stores", assembled(text))
        assert sum(map(int, spilled)) <= (8 if (kind, build) == SHORT else 0)


@pytest.mark.parametrize("arch", ARCHS[1:])
def test_the_emulation_compiles_beside_the_instruction(arch):
    device = Device("cuda", 0, arch, int(arch.strip("sm_a")), 48, plan.SMEM_LIMIT, True)
    c = plan.configure_emulated(REAL, device)
    for build, config in (("build_fc1", c.fc1), ("build_fc2", of_fc2(c))):
        found = ask(build, config, arch)
        assert found["local_bytes"] == 0
        assert count(found, r"OMMA\S*") == 0 and count(found, "HMMA") > 0


def launches(config: Nvfp4Config) -> dict[str, Any]:
    """Kernels of the pipeline, first to last."""
    return {
        "build_sort": config.sort,
        "build_quantise": config.rows,
        "build_fc1": config.fc1,
        "build_fc2": of_fc2(config),
    }


@pytest.mark.parametrize("arch", ["sm_90a", "sm_120a"])
def test_every_launch_of_the_pipeline_waits_for_the_one_before(arch):
    for build, c in launches(configuration("decode", arch)).items():
        ptx = ask(build, c, arch)["ptx"]
        # the first is launched as any other kernel
        assert ptx.count("griddepcontrol.wait") == (build != "build_sort")
        assert ptx.count("griddepcontrol.launch_dependents") == 1


def test_sm_80_has_no_conversion_and_no_early_launch_and_needs_none():
    for build, c in launches(configuration("decode", "sm_80")).items():
        found = ask(build, c, "sm_80")
        assert found["local_bytes"] == 0 and "griddepcontrol" not in found["ptx"]


@pytest.mark.parametrize("group", [16, 32])
@pytest.mark.parametrize("tile", [*plan.TILES.values(), *plan.MIXED_TILES.values()], ids=str)
def test_a_stage_holds_what_its_bytes_say(tile, group):
    from cutemoe.moe.cute_nvfp4_gemm import ExpertGemm

    tile = replace(tile, group=group)
    kind = "bf16" if tile.numbers else ""
    gemm = ExpertGemm(GemmConfig(120, tile, numbers=kind))
    assert gemm.sb_at + 4 * plan.BLOCK_N * gemm.words == tile.stage_bytes
    # stages and operands keep the 128 bytes that the permutation of chunks needs
    assert tile.stage_bytes % 128 == gemm.b_at % 128 == 0
    # a thread's passes are whole groups of 8 rows, and fill a tile
    for vector in (8, 16):
        gemm = ExpertGemm(GemmConfig(120, tile, vector=vector, numbers=kind))
        for passes, rows in ((gemm.pass_rows, plan.BLOCK_N), (gemm.left.pass_rows, tile.block_m)):
            assert passes % 8 == 0 and rows % passes == 0


def test_a_tile_that_does_not_fit_sm120_is_refused_before_it_is_traced():
    from cutemoe.moe.cute_nvfp4_gemm import ExpertGemm

    with pytest.raises(Unsupported, match=r"110592 bytes of shared memory, at most 101376"):
        ExpertGemm(GemmConfig(120, Tile(64, 256, 4, 2, 4)))


def place(layout: str, lane: int, value: int) -> int:
    """What a CuTe layout of lanes and values maps to."""
    shape, stride = (ast.literal_eval(part) for part in layout.split(":"))

    def offset(i: int, shape: Any, stride: Any) -> int:
        flat = [(shape, stride)] if isinstance(shape, int) else list(leaves(shape, stride))
        total = 0
        for n, d in flat:
            total += i % n * d
            i //= n
        return total

    return offset(lane, shape[0], stride[0]) + offset(value, shape[1], stride[1])


def leaves(shape: Any, stride: Any) -> Any:
    for n, d in zip(shape, stride, strict=True):
        if isinstance(n, tuple):
            yield from leaves(n, d)
        else:
            yield n, d


def test_the_dsl_has_the_operands_where_the_policies_have_them():
    """Of its own operation for sm_120a, which the kernels do not use; the table is in mma.py."""
    program = Path(__file__).with_name("mma_layouts.py")
    environment = {**os.environ, "CUTE_DSL_ARCH": "sm_120a"}
    done = subprocess.run(
        [sys.executable, program], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for v in range(32):
            register, i = divmod(v, 8)
            row, k = g + 8 * (register % 2), 8 * t + i + 32 * (register // 2)
            assert place(found["A"], lane, v) == row + 16 * k
        for v in range(16):
            assert place(found["B"], lane, v) == g + 8 * (8 * t + v % 8 + 32 * (v // 8))
        for v in range(4):
            assert place(found["C"], lane, v) == g + 8 * (v // 2) + 16 * (2 * t + v % 2)
        for k in range(64):
            assert place(found["SFA"], lane, k) == g + 8 * (t % 2) + 16 * k
            assert place(found["SFB"], lane, k) == g + 8 * k


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("arch", ["sm_80", *ARCHS])
def test_a_step_with_mxfp4_scales_compiles_into_the_instruction_meant(arch, half):
    from tests.compile.mma_step import Step

    number = int(arch.strip("sm_a"))
    found = worker().ask("tests.compile.mma_step:build", Step(number, half), arch)
    assert found["local_bytes"] == 0 and found["registers"] <= 64
    native = number >= 120
    assert len(re.findall(r"OMMA\.SF\.16864\.F32\.E2M1\.E2M1\.E8", found["sass"])) == native
    assert count(found, r"OMMA\S*") == native and count(found, "HMMA") == 4 * (not native)
