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

from typing import TYPE_CHECKING, Any

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
    mid = _fc1(problem, config, t, w)
    _fc2(problem, config, t, w, mid)
    combine.combine(w["y"], t.ids, t.weights, t.out, problem.experts, problem.expert_offset)


def sorted_rows(problem: Problem, config: MoEConfig, t: MoETensors) -> dict[str, torch.Tensor]:
    """Parts of the workspace by name, after the launch that sorts the slots into them."""
    plan = layout_of(problem)
    buffer = t.workspace
    if buffer is None:
        buffer = torch.empty(plan.nbytes, dtype=torch.uint8, device=t.x.device)
    w = plan.views(buffer)
    rows = (w["sorted_slots"], w["expert_start"], w["tiles"], w["tile_count"])
    # y is free until FC2
    sort.sort(t.ids, problem.experts, problem.expert_offset, config.block_m, rows, w["y"])
    return w


def most_tiles(problem: Problem, config: MoEConfig) -> int:
    """Most tiles that the rows can need, however they fall."""
    rows = problem.tokens * problem.top_k
    active = min(problem.experts, rows)
    return active + (rows - active) // config.block_m


def _fc1(
    problem: Problem,
    config: MoEConfig,
    t: MoETensors,
    w: dict[str, torch.Tensor],
) -> torch.Tensor:
    """FC1 and activation; mid [R, I] in sorted order."""
    x, token_scale, expert_scale, divide = t.x, None, None, problem.top_k
    if problem.activations == "fp8" and t.input_scale1 is None:
        x, token_scale = w["xq"], w["xq_scale"]
        quantize.quantize(t.x, x, "fp8", scale=token_scale)
    elif problem.activations in ("fp8", "nvfp4"):
        x, expert_scale, divide = w["xq"], t.input_scale1, 0
        quantize.quantize(
            t.x,
            x,
            problem.activations,
            expert_scale=expert_scale,
            slots=w["sorted_slots"],
            divide=problem.top_k,
            start=w["expert_start"],
        )
    spec = spec_of(
        t.w13,
        config.fc1,
        x,
        divide=divide,
        token_scale=token_scale is not None,
        expert_scale=expert_scale is not None,
        bias=t.b13 is not None,
        activation=problem.activation,
        order=problem.gate_up,
        alpha_e=isinstance(t.alpha, torch.Tensor),
        beta_e=isinstance(t.beta, torch.Tensor),
        limit_e=isinstance(t.limit, torch.Tensor),
        limit=t.limit is not None,
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
    return w["mid"]


def _fc2(
    problem: Problem,
    config: MoEConfig,
    t: MoETensors,
    w: dict[str, torch.Tensor],
    mid: torch.Tensor,
) -> None:
    """FC2 with bias; y float32 [R, H] in slot order."""
    scales: dict[str, Any] = {}
    if problem.activations in ("fp8", "nvfp4"):
        static = t.input_scale2
        token_scale = w["midq_scale"] if static is None else None
        quantize.quantize(
            mid,
            w["midq"],
            problem.activations,
            scale=token_scale,
            expert_scale=static,
            start=w["expert_start"],
        )
        mid = w["midq"]
        scales = {"token_scale": token_scale, "expert_scale": static}
    spec = spec_of(
        t.w2,
        config.fc2,
        mid,
        scatter=True,
        bias=t.b2 is not None,
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
