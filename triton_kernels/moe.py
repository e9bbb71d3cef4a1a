"""The Triton back end of `fused_moe`: sort, FC1 with activation, FC2, combine.

| launch | reads | writes |
|---|---|---|
| sort_slots, or count_chunks, place_chunks | ids | sorted_slots, starts, tiles, count |
| quantize_rows (fp8, nvfp4) | x | xq, scales |
| expert_gemm FC1 | x by sorted_slots // K, or xq; w13 | mid in sorted order |
| quantize_rows (fp8, nvfp4) | mid | midq, scales |
| expert_gemm FC2 | mid or midq; w2 | y in slot order |
| combine_slots | y, weights | out |

Grids are bounds that the host knows; programs beyond the live tiles exit. No synchronisation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from cutemoe.moe.problem import Problem
from cutemoe.moe.tensors import MoETensors
from cutemoe.moe.workspace import layout_of
from cutemoe.triton_kernels import combine, quantize, sort
from cutemoe.triton_kernels.grouped_gemm import multiply, spec_of

if TYPE_CHECKING:
    from cutemoe.moe.plan import MoEConfig


def run(problem: Problem, config: MoEConfig, t: MoETensors) -> None:
    """The Triton back end of `fused_moe`."""
    if problem.tokens == 0:
        return
    w = sorted_rows(problem, config, t)
    _fc1(problem, config, t, w)
    _fc2(problem, config, t, w)
    local = (problem.experts, problem.expert_offset)
    fused = problem.rounding == "fused"
    combine.combine(w["y"], t.ids, t.weights, t.out, *local, fused=fused)


def sorted_rows(problem: Problem, config: MoEConfig, t: MoETensors) -> dict[str, torch.Tensor]:
    """Parts of the workspace by name, after the launch that sorts the slots into them."""
    plan = layout_of(problem)
    w = plan.views(t.scratch(plan.nbytes))
    rows = (w["sorted_slots"], w["expert_start"], w["tiles"], w["tile_count"])
    # y is free until FC2
    sort.sort(t.ids, problem.experts, problem.expert_offset, config.block_m, rows, w["y"])
    return w


def most_tiles(problem: Problem, config: MoEConfig) -> int:
    """Most tiles that the rows can need, however they fall."""
    rows = problem.tokens * problem.top_k
    active = min(problem.experts, rows)
    return active + (rows - active) // config.block_m


def fc1_input(
    problem: Problem, t: MoETensors, w: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, int]:
    """What FC1 multiplies: x or its quantised rows, their scales by row of x or by expert, and how
    many slots share a row; 0 where rows are in sorted order."""
    if problem.activations not in ("fp8", "nvfp4"):
        return t.x, None, None, problem.top_k
    xq = w["xq"]
    if t.input_scale1 is None:
        quantize.quantize(t.x, xq, "fp8", scale=w["xq_scale"])
        return xq, w["xq_scale"], None, problem.top_k
    quantize.quantize(
        t.x,
        xq,
        problem.activations,
        expert_scale=t.input_scale1,
        slots=w["sorted_slots"],
        divide=problem.top_k,
        start=w["expert_start"],
    )
    return xq, None, t.input_scale1, 0


def fc2_input(
    problem: Problem, t: MoETensors, w: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """What FC2 multiplies, in sorted order: mid or its quantised rows, and their scales by row or
    by expert."""
    if problem.activations not in ("fp8", "nvfp4"):
        return w["mid"], None, None
    static = t.input_scale2
    scale = w["midq_scale"] if static is None else None
    quantize.quantize(
        w["mid"],
        w["midq"],
        problem.activations,
        scale=scale,
        expert_scale=static,
        start=w["expert_start"],
    )
    return w["midq"], scale, static


def _fc1(
    problem: Problem,
    config: MoEConfig,
    t: MoETensors,
    w: dict[str, torch.Tensor],
) -> None:
    """FC1 and activation; mid [R, I] in sorted order."""
    x, token_scale, expert_scale, divide = fc1_input(problem, t, w)
    spec = spec_of(
        t.w13,
        config.fc1,
        x,
        divide=divide,
        token_scale=token_scale is not None,
        expert_scale=expert_scale is not None,
        bias=t.b13 is not None,
        activation=_activation(problem, t),
        order=problem.gate_up,
        alpha_e=isinstance(t.alpha, torch.Tensor),
        beta_e=isinstance(t.beta, torch.Tensor),
        limit_e=isinstance(t.limit, torch.Tensor),
        limit=t.limit is not None,
        eager=problem.rounding == "eager",
    )
    multiply(
        spec,
        config.fc1.warps,
        most_tiles(problem, config),
        x,
        t.w13,
        w["mid"],
        (w["sorted_slots"], w["tiles"], w["tile_count"]),
        token_scale=token_scale,
        expert_scale=expert_scale,
        bias=t.b13,
        alpha=t.alpha,
        beta=t.beta,
        limit=t.limit,
    )


def _activation(problem: Problem, t: MoETensors) -> str:
    """The activation as `Spec` names it: eager torch computes that of alpha 1 as silu."""
    if problem.rounding == "eager" and problem.activation == "swiglu":
        return "swiglu" if isinstance(t.alpha, torch.Tensor) or t.alpha != 1.0 else "silu"
    return problem.activation


def _fc2(
    problem: Problem,
    config: MoEConfig,
    t: MoETensors,
    w: dict[str, torch.Tensor],
) -> None:
    """FC2 with bias; y float32 [R, H] in slot order, where eager of values that x's dtype has."""
    mid, token_scale, expert_scale = fc2_input(problem, t, w)
    scales = {"token_scale": token_scale, "expert_scale": expert_scale}
    spec = spec_of(
        t.w2,
        config.fc2,
        mid,
        scatter=True,
        bias=t.b2 is not None,
        eager=problem.rounding == "eager",
        **{name: value is not None for name, value in scales.items()},
    )
    multiply(
        spec,
        config.fc2.warps,
        most_tiles(problem, config),
        mid,
        t.w2,
        w["y"],
        (w["sorted_slots"], w["tiles"], w["tile_count"]),
        bias=t.b2,
        **scales,
    )
