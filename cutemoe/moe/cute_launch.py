"""The CuTe back end of `fused_moe`: sort, FC1 with activation, FC2, combine.

| launch | reads | writes |
|---|---|---|
| sort_slots, or count_chunks, place_chunks (Triton); none of few rows | ids | sorted_slots, starts, tiles, count |
| quantize_rows (Triton, fp8) | x | xq, scales |
| pack_tiles (Triton), of many rows | x, by sorted_slots // K | x_tiles |
| ExpertGemm FC1 | x_tiles, or x or xq, by sorted_slots // K; w13 | mid in sorted order, packed if it can be |
| quantize_rows (Triton, fp8) | mid | midq, scales |
| ExpertGemm FC2 | mid or midq; w2 | y in slot order |
| combine_slots (Triton) | y, weights | out |

No synchronisation; nothing depends on values that only the device knows. Few rows of activations that
are not quantised are sorted by both GEMMs.
"""  # noqa: E501

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cutemoe.gemm.cute_launch import multiply
from cutemoe.gemm.cute_plan import MOST_SORTED
from cutemoe.moe.problem import Problem
from cutemoe.moe.tensors import MoETensors
from cutemoe.moe.workspace import layout_of, packs
from cutemoe.triton_kernels import combine, pack
from cutemoe.triton_kernels.moe import fc1_input, fc2_input, most_tiles, sorted_rows

if TYPE_CHECKING:
    from cutemoe.moe.plan import MoEConfig


def run(problem: Problem, config: MoEConfig, t: MoETensors) -> None:
    """The CuTe back end of `fused_moe`."""
    if problem.tokens == 0:
        return
    work: tuple[Any, ...] = (t.ids, problem.expert_offset)
    tiles = None
    if sorts_itself(problem):
        plan = layout_of(problem)
        w = plan.views(t.scratch(plan.nbytes))
    else:
        w = sorted_rows(problem, config, t)
        work = (w["sorted_slots"], w["tiles"], w["tile_count"])
        tiles = w.get("x_tiles")
    most = most_tiles(problem, config)
    packed = packs(problem.activations, problem.intermediate, problem.layout)
    x, token_scale, expert_scale, divide = fc1_input(problem, t, w)
    if tiles is not None:
        pack.pack(x, tiles, divide, most, work)
        x, divide = tiles, 0
    multiply(
        config.fc1,
        most,
        x,
        t.w13,
        w["mid"],
        work,
        x_scale=_scale(token_scale, expert_scale),
        bias=t.b13,
        params=(t.alpha, t.beta, t.limit),
        top_k=max(divide, 1),
        gather=divide > 0,
        activation=problem.activation,
        packed_x=tiles is not None,
        packed_out=packed,
    )
    mid, *scales = fc2_input(problem, t, w)
    x_scale = _scale(*scales)
    multiply(
        config.fc2,
        most,
        mid,
        t.w2,
        w["y"],
        work,
        x_scale=x_scale,
        bias=t.b2,
        scatter=True,
        packed_x=packed,
        early=True,
    )
    combine.combine(w["y"], t.ids, t.weights, t.out, problem.experts, problem.expert_offset)


def sorts_itself(problem: Problem) -> bool:
    """The GEMMs sort the rows: they are few, and no other launch has to know their order."""
    few = problem.tokens * problem.top_k <= MOST_SORTED
    return few and problem.activations in ("bf16", "fp16")


def _scale(
    token_scale: torch.Tensor | None, expert_scale: torch.Tensor | None
) -> tuple[str, torch.Tensor | None]:
    """Config's word for the scales of a GEMM's input, and their tensor."""
    if token_scale is not None:
        return "row", token_scale
    return ("none" if expert_scale is None else "expert"), expert_scale
