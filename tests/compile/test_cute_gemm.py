"""The Hopper GEMM compiles without a GPU: registers, shared memory, the budget of its main loop."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from cutemoe.gemm.cute_plan import (
    MOST_ROWS_OF_FOUR_PAIRS,
    STAGE_US,
    Config,
    Recipe,
    Tile,
    choose_rows,
    choose_tile,
    deepest,
)
from cutemoe.runtime.device import Device
from tests.compile import limits
from tests.compile.cute_harness import worker

pytest.importorskip("cutlass")
BUILD = "cutemoe.gemm.cute_build:build"
H200 = Device("cuda", 0, "H200", 90, 132, 232448, True)
# mean tokens of an expert
MEANS = (1, 12, 24, 96)
GATED: dict[str, Any] = {"activation": "swiglu", "order": "interleaved", "packed_out": True}
SWIGLU: dict[str, Any] = {**GATED, "gather": True}
KINDS: dict[str, dict[str, Any]] = {
    "fc1": SWIGLU,
    "fc1 of gpt-oss": {**SWIGLU, "bias": True, "factor": True, "limit": True},
    "fc1 with parameters of experts": {**SWIGLU, "params": (True, True, True), "limit": True},
    "fc1, gelu": {"gather": True, "activation": "geglu", "order": "gate_up"},
    "fc1, tiles of x": {**GATED, "packed_x": True},
    "fc1, rows for fc2": {**SWIGLU, "packed_out": False, "bias": True},
    "fc2": {"scatter": True, "out": "fp32", "packed_x": True},
    "fc2 with bias": {"scatter": True, "out": "fp32", "packed_x": True, "bias": True},
    "fc2, rows": {"scatter": True, "out": "fp32"},
    "fc1, ungated": {"gather": True, "activation": "relu2", "packed_out": True},
    "groups": {"zero_tail": True},
    "fc1, sorting": {**SWIGLU, "ids": "int64", "bias": True},
    "fc2, sorting": {
        "scatter": True,
        "out": "fp32",
        "packed_x": True,
        "ids": "int32",
        "early": True,
    },
}
MXFP4, NVFP4 = Recipe("mxfp4", 32), Recipe("nvfp4", 16)
W4A8 = Recipe("int4", 128, "fp8")
INT4 = [Recipe("int4", group, kind) for group in (32, 64, 128) for kind in ("bf16", "fp8")]
PAIR = ("fc1", "fc2")
CASES = [(MXFP4, mean, kind) for mean in MEANS for kind in PAIR]
CASES += [(MXFP4, mean, "fc1") for mean in (32, 50, 70, 128, 1000)]
CASES += [(MXFP4, 1, kind) for kind in KINDS if kind not in (*PAIR, "fc1, tiles of x")]
CASES += [(recipe, mean, "fc1, tiles of x") for recipe in (MXFP4, NVFP4) for mean in (96, 128)]
CASES += [(MXFP4, mean, "fc1 of gpt-oss") for mean in (8, 32, 128)]
CASES += [(recipe, 32, "fc1, sorting") for recipe in (MXFP4, NVFP4)]
CASES += [(NVFP4, 1, "fc1"), (NVFP4, 96, "fc2"), (NVFP4, 128, "fc1 of gpt-oss")]
# every set of widths; bias and factor take registers in the epilogue
CASES += [(W4A8, mean, "fc1") for mean in (1, 12, 30, 40, 60, 96, 1000)]
CASES += [(W4A8, mean, "fc2") for mean in (1, 96)]
CASES += [(W4A8, mean, "fc1 of gpt-oss") for mean in (1, 96)]
CASES += [(recipe, mean, "fc1") for recipe in INT4 if recipe != W4A8 for mean in (24, 96)]
CASES += [(Recipe("mxfp4", 32, "fp8"), mean, kind) for mean in (1, 24, 96) for kind in PAIR]
CASES += [(Recipe("int4", 128, "fp16"), 40, "fc1"), (Recipe("nvfp4", 16, "fp16"), 1, "fc2")]
CASES += [(Recipe("mxfp4", 32, "fp16"), mean, "fc1 of gpt-oss") for mean in (1, 96)]
# how the weights may be cut for few tokens; four warpgroups of two blocks not for the most of them
CUTS = [
    (mean, shape)
    for mean in (1, 12, 24, 30)
    for shape in STAGE_US
    if shape != (4, 2) or choose_rows(mean, MXFP4)[-1] <= MOST_ROWS_OF_FOUR_PAIRS
]


def shipped(recipe: Recipe, mean: float) -> Tile:
    """The tile for a full card."""
    return choose_tile(recipe, choose_rows(mean, recipe), 1e4, 64, H200)


def configured(recipe: Recipe, mean: float, kind: str) -> Config:
    """As the launch of a layer asks for it."""
    given = dict(KINDS[kind])
    if recipe.activations == "fp8":
        given |= {"x_scale": "row", "out": "fp32", "packed_x": False, "packed_out": False}
    elif recipe.activations == "fp16":
        given.setdefault("out", "fp16")
    return Config(recipe, shipped(recipe, mean), **given)


def main_loop(sass: str, config: Config) -> Counter[str]:
    """Instructions from one wait for a full stage to the next, in the widest tile.

    The body of a stage is straight code, with every wgmma of the stage.
    """
    lines = [re.sub(r"^@!?U?P\w+ ", "", line.strip()) for line in sass.splitlines()]
    branches = [i for i, line in enumerate(lines) if line.startswith("BRA")]
    wanted = config.tile.blocks * 128 // (32 // config.recipe.width)
    for start, end in itertools.pairwise(branches):
        names = Counter(line.split()[0].split(".")[0].rstrip(";") for line in lines[start:end])
        if names["HGMMA"] + names["QGMMA"] == wanted:
            return names
    raise AssertionError("no main loop")


def waits(config: Config) -> int:
    """wgmma waits that the source asks for: after every step, or with four sets of fragments after
    half of them, before every sum of a group, at the end of half a stage and of all; a stage and
    half of one for every width."""
    recipe, t = config.recipe, config.tile
    step = 32
    if recipe.activations == "fp8":
        step = min(64, recipe.group) if recipe.weight == "int4" else 64
    group = 128 if recipe.weight == "mxfp4" else recipe.group
    count = 0
    for columns in (128, 64):
        steps = t.blocks * (columns // step)
        if t.sets == 4 and not recipe.partial:
            steps = sum(s % 4 in (0, 3) or s == steps - 1 for s in range(steps))
        count += steps
        if recipe.partial:
            count += t.blocks * -(-columns // group)
    return len(t.rows) * (count + 2)


def loader_registers(sass: str) -> int:
    """Registers that the warps that load name, between giving some away and the math's code."""
    lines = sass.splitlines()
    down, up = (i for i, line in enumerate(lines) if "USETMAXREG" in line)
    assert "DEALLOC" in lines[down] and "ALLOC" in lines[up]
    named = re.findall(r"\bR(\d+)(\.64)?\b", "\n".join(lines[down:up]))
    return 1 + max(int(n) + bool(wide) for n, wide in named)


def fits(config: Config) -> None:
    """No local memory, wgmma not serialized, few registers for the warps that load."""
    c = worker().ask(BUILD, config, "sm_90a")
    kernel = f"{config.recipe.weight} x {config.recipe.activations}, {config.tile.block_m} rows"
    assert c["local_bytes"] <= limits.local_bytes(kernel) and c["registers"] <= 168
    multiply = "QGMMA" if config.recipe.activations == "fp8" else "HGMMA"
    multiplies = len(config.tile.rows) * config.tile.blocks * 192 * config.recipe.width // 32
    found = c["sass"].count(multiply)
    # the loop of a narrow tile may be unrolled
    assert found >= multiplies
    # more waits than the source asks for: ptxas has made multiplies one after the other
    assert c["sass"].count("WARPGROUP.DEPBAR") <= waits(config) * found / multiplies
    assert loader_registers(c["sass"]) <= config.tile.registers[0]
    assert re.search(r"UBLKCP", c["sass"])
    assert bool(re.search(r"LDGSTS\S*\.128", c["sass"])) != config.packed_x


@pytest.mark.parametrize(("recipe", "mean", "kind"), CASES, ids=str)
def test_compiles_into_registers_and_wgmma(recipe, mean, kind):
    fits(configured(recipe, mean, kind))


@pytest.mark.parametrize(
    ("recipe", "mean"),
    [(MXFP4, 8), (MXFP4, 32), (NVFP4, 32), (Recipe("mxfp4", 32, "fp16"), 32)],
    ids=str,
)
def test_three_warpgroups_of_two_blocks_fit(recipe, mean):
    """gpt-oss-120b: 128 experts of 90 blocks."""
    config = configured(recipe, mean, "fc1 of gpt-oss")
    tile = choose_tile(recipe, config.tile.rows, 128, 90, H200)
    assert (tile.warpgroups, tile.blocks) == (3, 2) and tile.sets == 4
    fits(replace(config, tile=tile))


@pytest.mark.parametrize(("mean", "shape"), CUTS, ids=str)
@pytest.mark.parametrize(
    ("recipe", "kind"), [(MXFP4, "fc1 of gpt-oss"), (NVFP4, "fc2, sorting")], ids=str
)
def test_every_cut_of_few_tokens_fits(recipe, kind, mean, shape):
    config = configured(recipe, mean, kind)
    fits(replace(config, tile=deepest(recipe, Tile(config.tile.rows, shape[0], shape[1], 1, 1))))


@pytest.mark.parametrize("mean", MEANS)
def test_the_main_loop_keeps_its_budget(mean):
    """Instructions a 4-bit weight of a lane: conversion at most 2.0, all at most 2.6."""
    config = configured(MXFP4, mean, "fc1")
    weights = 64 * config.tile.blocks
    found = main_loop(worker().ask(BUILD, config, "sm_90a")["sass"], config)
    # shifts to the left run as IMAD; its few other uses in the loop count against the budget
    convert = sum(found[name] for name in ("LOP3", "SHF", "IMAD", "HMUL2")) / weights
    assert found["HMUL2"] == weights // 2
    print(f"mean {mean}: {sum(found.values()) / weights:.2f} a weight, {convert:.2f} in")
    assert convert <= 2.0 and sum(found.values()) / weights <= 2.6


@pytest.mark.parametrize(
    ("recipe", "mean", "most"),
    [
        # as compiled, 2026-11; widening both operands to bf16 would take 2.5 and twice the wgmma
        (W4A8, 1, 1.49),
        (W4A8, 24, 1.62),
        (W4A8, 96, 1.89),
        (Recipe("mxfp4", 32, "fp8"), 1, 2.09),
        (Recipe("mxfp4", 32, "fp8"), 24, 2.12),
        (Recipe("int4", 128), 1, 2.40),
        (Recipe("mxfp4", 32, "fp16"), 1, 2.53),
    ],
    ids=str,
)
def test_main_loops_of_the_other_recipes(recipe, mean, most):
    """Instructions a weight of a lane: what the recipes were chosen for."""
    config = configured(recipe, mean, "fc1")
    found = main_loop(worker().ask(BUILD, config, "sm_90a")["sass"], config)
    count = sum(found.values()) / (64 * config.tile.blocks)
    print(f"{recipe} at {mean}: {count:.2f} a weight")
    assert count <= most
