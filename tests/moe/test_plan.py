"""Refusals and configurations, as pure functions of a problem and a device."""

import json
from dataclasses import replace

import pytest

from cutemoe import registry
from cutemoe.gemm.cute_plan import Config, Recipe, choose_rows, choose_tile
from cutemoe.gemm.plan import weight_layout
from cutemoe.moe import plan
from cutemoe.moe.problem import Problem
from cutemoe.moe.routing import RouteProblem
from cutemoe.moe.workspace import MIN_TILE_ROWS
from cutemoe.runtime import tune
from cutemoe.runtime.backend import choose, explain
from cutemoe.runtime.device import Device
from tests.moe.cases import SUPPORTED

H200 = Device("cuda", 0, "H200", 90, 132, 232448, True)
A100 = Device("cuda", 0, "A100", 80, 108, 166912, True)
V100 = Device("cuda", 0, "V100", 70, 80, 98304, True)
BARE = Device("cuda", 0, "H200", 90, 132, 232448, False)
GOOD = Problem(
    tokens=16,
    hidden=2880,
    intermediate=2880,
    experts=32,
    top_k=4,
    gated=True,
    weight="mxfp4",
    group_size=32,
    layout="rows",
    activations="bf16",
    dtype="bf16",
    gate_up="interleaved",
    activation="swiglu",
    per_expert_params=False,
    has_limit=True,
    has_b13=True,
    has_b2=True,
    static_scale=False,
    ids="int32",
    expert_offset=0,
    deterministic=True,
    rounding="fused",
)
ROUTE = RouteProblem(
    tokens=16,
    experts=128,
    top_k=4,
    method="softmax_topk",
    renormalize=True,
    has_bias=False,
    n_group=1,
    topk_group=1,
    scale=1.0,
    dtype="fp32",
)
TRITON = next(b for b in plan.BACKENDS if b.name == "triton")
CUTE = next(b for b in plan.BACKENDS if b.name == "cute")


@pytest.mark.parametrize(("weight", "activations"), SUPPORTED)
def test_triton_takes_what_is_promised(weight, activations):
    problem = replace(GOOD, weight=weight, activations=activations)
    assert TRITON.reason(problem, H200) is None
    assert choose("fused_moe", plan.BACKENDS, problem, H200, "auto") is TRITON


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weight": "fp8"}, "weights in one of"),
        ({"weight": "bf16", "activations": "fp8"}, "bf16 weights take"),
        ({"weight": "mxfp4", "activations": "nvfp4"}, "mxfp4 weights take"),
        ({"layout": "tiles"}, "layout rows or sm80_w4_bf16, got 'tiles'"),
        ({"layout": "sm80_w4_fp16"}, "layout rows or sm80_w4_bf16"),
        ({"layout": "sm80_w4_bf16", "activations": "fp16"}, "layout rows or sm80_w4_fp16"),
        ({"top_k": plan.MAX_TOP_K + 1}, "top_k <= 32, got 33"),
        ({"experts": plan.MAX_EXPERTS + 1}, "experts <= 1024, got 1025"),
        ({"tokens": 2**30}, "tokens * top_k <= "),
    ],
)
def test_triton_says_why_not(changed, words):
    problem = replace(GOOD, **changed)
    assert words in (TRITON.reason(problem, H200) or "")
    found = explain("fused_moe", plan.BACKENDS, problem, H200, "triton")
    assert found.backend is None


@pytest.mark.parametrize("weight", ["bf16", "mxfp4"])
def test_triton_alone_rounds_as_torch(weight):
    problem = replace(GOOD, weight=weight, rounding="eager")
    assert choose("fused_moe", plan.BACKENDS, problem, H200, "auto") is TRITON
    for layout in ("rows", "sm90_rs_w4"):
        refused = {b.name: b.refuse(replace(problem, layout=layout), H200) for b in plan.BACKENDS}
        assert all(refused[name] for name in refused if name.startswith("cute"))
        assert refused["reference"] is None


@pytest.mark.parametrize("device", [V100, BARE, Device("cpu", has_triton=True)], ids=str)
def test_triton_is_unavailable(device):
    assert TRITON.reason(GOOD, device)
    assert plan.ROUTE_BACKENDS[0].reason(ROUTE, device)


@pytest.mark.parametrize("activations", ["bf16", "fp8"])
def test_sm80_is_enough(activations):
    assert TRITON.reason(replace(GOOD, activations=activations), A100) is None


def test_the_reference_refuses_nothing_and_warns_on_a_gpu():
    problem = replace(GOOD, weight="fp8")
    assert plan.BACKENDS[-1].reason(problem, H200) is None
    with pytest.warns(UserWarning, match="slow back end 'reference'.*triton: "):
        chosen = choose("fused_moe", plan.BACKENDS, problem, H200, "auto")
    assert chosen.name == "reference"


@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 256, 1024, 4096])
@pytest.mark.parametrize(("weight", "activations"), SUPPORTED)
def test_configurations_are_hashable_and_within_the_workspace(tokens, weight, activations):
    problem = replace(GOOD, tokens=tokens, weight=weight, activations=activations)
    config = TRITON.config(problem, H200)
    assert hash(config) == hash(TRITON.config(problem, H200))
    assert config.block_m >= MIN_TILE_ROWS


@pytest.mark.parametrize("experts", [1, 7, 128, 1024])
def test_every_routing_has_a_configuration(experts):
    back_end = plan.ROUTE_BACKENDS[0]
    problem = replace(ROUTE, experts=experts, top_k=1)
    assert back_end.reason(problem, H200) is None
    assert hash(back_end.config(problem, H200)) is not None


@pytest.mark.parametrize(
    ("activations", "backend", "device", "layout"),
    [
        ("bf16", "auto", H200, "sm90_rs_w4"),
        ("bf16", "cute", H200, "sm90_rs_w4"),
        ("bf16", "triton", H200, "sm80_w4_bf16"),
        ("bf16", "cute", A100, "rows"),
        ("bf16", "auto", A100, "sm80_w4_bf16"),
        ("fp16", "auto", H200, "sm90_rs_w4_fp16"),
        ("fp16", "triton", H200, "sm80_w4_fp16"),
        ("fp16", "auto", A100, "sm80_w4_fp16"),
        ("fp8", "auto", H200, "sm80_w4_bf16"),
        ("fp8", "triton", A100, "sm80_w4_bf16"),
        ("nvfp4", "auto", H200, "sm80_w4_bf16"),
        ("bf16", "reference", H200, "rows"),
        ("bf16", "auto", V100, "rows"),
        ("bf16", "auto", BARE, "rows"),
        ("bf16", "auto", Device("cpu", has_triton=True, interprets=True), "rows"),
        ("bf16", "triton", Device("cpu", has_triton=True, interprets=True), "sm80_w4_bf16"),
        ("bf16", "triton", Device("cpu", has_triton=True), "rows"),
    ],
)
def test_weights_sit_where_their_back_end_wants_them(activations, backend, device, layout):
    pytest.importorskip("cutlass")
    assert weight_layout("nvfp4", activations, backend, device) == layout
    problem = replace(GOOD, weight="nvfp4", activations=activations, layout=layout)
    assert (CUTE if layout.startswith("sm90_rs_w4") else TRITON).refuse(problem, H200) is None


def test_int4_and_dense_weights_are_packed_for_triton():
    for weight in ("int4", "dense"):
        assert weight_layout(weight, "bf16", "triton", H200) == "sm80_w4_bf16"
    assert weight_layout("dense", "bf16", "auto", H200) == "sm80_w4_bf16"


@pytest.mark.parametrize("weight", ["mxfp4", "int4"])
@pytest.mark.parametrize("activations", ["bf16", "fp16", "fp8"])
def test_the_hopper_layout_follows_the_activations(weight, activations):
    pytest.importorskip("cutlass")
    layout = "sm90_rs_w4" + ("" if activations == "bf16" else f"_{activations}")
    assert weight_layout(weight, activations, "auto", H200) == layout
    problem = replace(GOOD, weight=weight, activations=activations, layout=layout)
    assert CUTE.refuse(problem, H200) is None
    assert "weights in layout" in (TRITON.refuse(problem, H200) or "")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weight": "fp8"}, "with bf16 weights in one of mxfp4, nvfp4, int4, got fp8"),
        (
            {"weight": "nvfp4", "activations": "fp8"},
            "with fp8 weights in one of mxfp4, int4, got nvfp4",
        ),
        ({"activations": "nvfp4"}, "activations in one of bf16, fp16, fp8, got 'nvfp4'"),
        ({"activations": "fp16"}, "layout sm90_rs_w4_fp16, got 'sm90_rs_w4'"),
        ({"layout": "rows"}, "layout sm90_rs_w4, got 'rows'"),
        ({"top_k": plan.MAX_TOP_K + 1}, "top_k <= 32, got 33"),
        ({"experts": plan.MAX_EXPERTS + 1}, "experts <= 1024, got 1025"),
        ({"rounding": "eager"}, "rounding 'fused', got 'eager' (prepare with backend='triton')"),
    ],
)
def test_cute_says_why_not(changed, words):
    problem = replace(GOOD, **({"layout": "sm90_rs_w4"} | changed))
    assert words in (CUTE.refuse(problem, H200) or "")


def test_cute_needs_hopper_and_triton():
    pytest.importorskip("cutlass")
    assert CUTE.reason(replace(GOOD, layout="sm90_rs_w4"), H200) is None
    for device in (A100, BARE, Device("cpu", has_triton=True)):
        assert CUTE.unavailable(device)


RECIPES = [
    Recipe("mxfp4", 32),
    Recipe("nvfp4", 16, "fp16"),
    Recipe("int4", 32, "fp16"),
    Recipe("int4", 128),
    Recipe("int4", 128, "fp8"),
    Recipe("mxfp4", 32, "fp8"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 256, 1024, 4096, 100000])
def test_cute_tiles_fit_the_card(tokens, recipe):
    formats = {
        "weight": recipe.weight,
        "group_size": recipe.group,
        "activations": recipe.activations,
    }
    config = CUTE.config(replace(GOOD, tokens=tokens, experts=128, **formats), H200)
    assert config.fc1.rows == config.fc2.rows and config.block_m == config.fc1.block_m
    for tile in (config.fc1, config.fc2):
        assert tile.rows[0] >= MIN_TILE_ROWS and all(m % 8 == 0 for m in tile.rows)
        assert tile.rows == tuple(sorted(set(tile.rows))) and len(tile.rows) <= 4
        assert Config(recipe, tile).smem_bytes <= H200.smem_bytes and tile.lag < tile.stages
        load, math = tile.registers
        assert load + tile.warpgroups * math <= 512 // tile.ctas


def problem_of(recipe: Recipe, tokens: int) -> Problem:
    formats = {"weight": recipe.weight, "group_size": recipe.group}
    return replace(GOOD, tokens=tokens, experts=128, activations=recipe.activations, **formats)


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 1024, 4096])
def test_what_is_searched_fits_the_card(tokens, recipe):
    problem = problem_of(recipe, tokens)
    assert CUTE.tuning is not None
    with tune.trying(None):
        start = CUTE.config(problem, H200)
    for vary in CUTE.tuning.passes(problem, H200):
        found = list(vary(start))
        assert found and len(set(found)) == len(found)
        for c in found:
            assert c.block_m == c.fc1.block_m == c.fc2.block_m
            for tile in (c.fc1, c.fc2):
                assert (
                    Config(recipe, tile).smem_bytes <= (H200.smem_bytes + 1024) // tile.ctas - 1024
                )
                assert tile.lag < tile.stages
                load, math = tile.registers
                assert load + tile.warpgroups * math <= 512 // tile.ctas


def test_a_measured_configuration_stands_in_for_the_heuristic():
    problem = problem_of(RECIPES[0], 64)
    assert CUTE.tuning is not None
    with tune.trying(None):
        start = CUTE.config(problem, H200)
        other = [c for vary in CUTE.tuning.passes(problem, H200) for c in vary(start)][-1]
    # as a table holds it
    plain = json.loads(json.dumps(CUTE.tuning.plain(other)))
    with tune.trying(plain):
        assert CUTE.config(problem, H200) == other != start
    shape, size = CUTE.tuning.key(problem)
    assert size == 64 and json.dumps(shape)


@pytest.mark.parametrize(
    ("mean", "rows"),
    [(0.02, (8, 16)), (6, (8, 16)), (24, (24, 32, 40)), (96, (80, 96, 112, 128)), (3000, None)],
)
def test_rows_of_a_tile_follow_the_tokens_of_an_expert(mean, rows):
    assert choose_rows(mean, Recipe("mxfp4", 32)) == (rows or (32, 64, 96, 128))
    assert choose_rows(3000, Recipe("int4", 64)) == (32, 64, 96)
    assert choose_rows(96, Recipe("int4", 64, "fp8")) == (80, 96, 112)


def test_warpgroups_divide_the_blocks_evenly():
    """One token of the headline shape, 6 experts of 64 blocks: 132 items of 3 blocks."""

    def shape(rows, experts, blocks, recipe=Recipe("mxfp4", 32)):  # noqa: B008
        tile = choose_tile(recipe, rows, experts, blocks, H200)
        return tile.warpgroups, tile.blocks

    assert shape((8, 16), 6, 64) == (3, 1)
    # 22.7 experts: 1.9 rounds of six blocks each, 1.4 of eight
    assert shape((8, 16), 22.7, 64) == (3, 2)
    assert shape((8, 16), 200, 64) == (4, 2)
    # 90 blocks are 15 times 6, and 12 times 8 but for 6; 48 tokens leave eight no registers
    assert shape((24, 32, 40, 48), 128, 90) == (3, 2)
    # their sums need the registers of a second block
    assert shape((8, 16), 200, 64, Recipe("int4", 128, "fp8")) == (4, 1)


def test_every_op_is_found():
    for op in ("route", "fused_moe", "grouped_gemm"):
        assert registry.backends(op)


def test_the_shipped_table_is_found_and_fits():
    """The row of 64 tokens of the headline shape, for the batches of its kind."""
    layer = replace(GOOD, hidden=4096, intermediate=2048, experts=256, top_k=6)
    layer = replace(layer, layout="sm90_rs_w4")
    measured = CUTE.config(replace(layer, tokens=64), H200)
    assert measured.block_m == 16 and measured.fc1.rows == (8, 16)
    assert CUTE.config(replace(layer, tokens=17), H200) == measured
    # other rows by the heuristic, or too far below
    for tokens in (16, 1025, 65):
        config = CUTE.config(replace(layer, tokens=tokens), H200)
        with tune.trying(None):
            assert config == CUTE.config(replace(layer, tokens=tokens), H200)
    assert Config(RECIPES[0], measured.fc1).smem_bytes <= H200.smem_bytes
