"""Who runs a NVFP4 layer, and in how many launches, by its routed rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cutemoe
from cutemoe.moe import cute_nvfp4_plan, hybrid
from cutemoe.moe.hybrid import EMULATED, MAX_ROWS, NATIVE, plug_prefill, prefill_of, style_of
from cutemoe.moe.problem import Problem
from cutemoe.runtime.device import Device

RTX = Device("cuda", 0, "RTX PRO 6000", 120, 188, 101376, True)
H200 = Device("cuda", 0, "H200", 90, 132, 232448, True)
LAYER = Problem(
    tokens=16, hidden=4096, intermediate=2048, experts=256, top_k=8, gated=True, weight="nvfp4",
    group_size=16, layout="sm120_fp4", activations="nvfp4", dtype="bf16", gate_up="up_gate",
    activation="swiglu", per_expert_params=True, has_limit=True, has_b13=True, has_b2=True,
    static_scale=True, ids="int32", expert_offset=0, deterministic=True, rounding="fused",
)  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_plugged() -> Iterator[None]:
    assert not hybrid._PLUGGED
    yield
    hybrid._PLUGGED.clear()


@pytest.mark.parametrize("table", [NATIVE, EMULATED], ids=["native", "emulated"])
def test_tables_ascend_and_end_with_the_pipeline(table):
    bounds = [most for most, _ in table]
    assert bounds == sorted(set(bounds)) and table[-1] == (MAX_ROWS, "pipeline")
    assert {style for _, style in table} <= {"static", "dynamic", "pipeline"}


def test_every_style_has_its_rows():
    rows = (1, 64, 65, 1024, 1025, MAX_ROWS)
    assert [style_of(n, True) for n in rows] == [
        "static", "static", "dynamic", "dynamic", "pipeline", "pipeline",
    ]  # fmt: skip
    assert {style_of(n, False) for n in rows} == {"pipeline"}
    assert style_of(9, True, ((8, "dynamic"), (9, "static"), (MAX_ROWS, "pipeline"))) == "static"


def test_nothing_plugged_in_rounds_as_torch():
    plug_prefill("other", lambda problem, tensors: None, 1)
    assert prefill_of(LAYER, RTX) is not None
    assert prefill_of(replace(LAYER, rounding="eager"), RTX) is None


@given(tokens=st.integers(1, 200_000), top_k=st.integers(1, 32))
def test_the_plan_follows_the_table(tokens, top_k):
    problem = replace(LAYER, tokens=tokens, top_k=top_k)
    for device in (RTX, H200):
        config = cute_nvfp4_plan.configure(problem, device)
        assert config.style == style_of(tokens * top_k, device is RTX)
        assert config.prefill is None


def test_prefill_from_elsewhere_gets_its_rows_and_no_others():
    unplug = plug_prefill("theirs", lambda *_: None, 512)
    small, large = replace(LAYER, tokens=63), replace(LAYER, tokens=64)
    before = cute_nvfp4_plan.configure(small, RTX)
    assert before.style == "dynamic" and before.prefill is None
    config = cute_nvfp4_plan.configure(large, RTX)
    assert config.style == "external" and config.prefill is not None
    # whoever names a style gets it
    assert cute_nvfp4_plan.configure_static(large, RTX).prefill is None
    unplug()
    assert cute_nvfp4_plan.configure(large, RTX).style == "dynamic"
    unplug()


def test_the_largest_threshold_is_asked_first_and_a_refusal_passes_on():
    plug_prefill("all", lambda *_: None, 1)
    plug_prefill("most", lambda *_: None, 100)
    picky = plug_prefill("picky", lambda *_: None, 1000, lambda p, d: f"sm_90, got {d}")
    names = [
        getattr(prefill_of(replace(LAYER, tokens=t), RTX), "name", None) for t in (1, 12, 13, 999)
    ]
    assert names == ["all", "all", "most", "most"]
    picky()
    plug_prefill("most", lambda *_: None, 2000)
    assert getattr(prefill_of(replace(LAYER, tokens=13), RTX), "name", None) == "all"


def test_it_runs_in_place_of_our_kernels():
    from cutemoe.moe import api, cute_nvfp4_launch
    from tests.moe.cases import exact_layer, exact_x

    seen: list[Any] = []

    def theirs(problem: Problem, t: Any) -> None:
        seen.append(problem)
        t.out.fill_(3.0)

    plug_prefill("theirs", theirs, 1)
    layer = exact_layer("nvfp4", "nvfp4")
    x, ids, weights = exact_x(4, layer, 1), torch.zeros(4, 2).int(), torch.ones(4, 2)
    t, _ = api._tensors(x, layer.prepared(), ids, weights, cutemoe.SwiGLU(), None, None, "auto")
    problem = replace(LAYER, tokens=4, top_k=2, hidden=64, intermediate=96, experts=5)
    cute_nvfp4_launch.run(problem, cute_nvfp4_plan.configure(problem, RTX), t)
    assert seen == [problem] and bool((t.out == 3).all())


@pytest.mark.parametrize("rows", [0, -1, True, 1.5])
def test_rows_are_a_positive_number(rows):
    with pytest.raises(cutemoe.InvalidCall, match="rows: expected a positive integer"):
        plug_prefill("theirs", lambda *_: None, rows)


def test_functions_are_functions():
    with pytest.raises(cutemoe.InvalidCall, match="run: expected a function"):
        plug_prefill("theirs", "module:function", 1)  # type: ignore[arg-type]
