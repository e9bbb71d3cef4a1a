"""The CuTe back end of `fused_moe`: sort, FC1 with activation, FC2, combine.

| launch | reads | writes |
|---|---|---|
| sort_slots, or count_chunks, place_chunks (Triton) | ids | sorted_slots, starts, tiles, count |
| ExpertGemm FC1 | x by sorted_slots // K; w13 | mid in sorted order |
| ExpertGemm FC2 | mid; w2 | y in slot order |
| combine_slots (Triton) | y, weights | out |

No synchronisation; nothing depends on values that only the device knows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cutemoe.gemm.cute_launch import multiply
from cutemoe.moe.problem import Problem
from cutemoe.moe.tensors import MoETensors
from cutemoe.triton_kernels import combine
from cutemoe.triton_kernels.moe import most_tiles, sorted_rows

if TYPE_CHECKING:
    from cutemoe.moe.plan import MoEConfig


def run(problem: Problem, config: MoEConfig, t: MoETensors) -> None:
    """The CuTe back end of `fused_moe`."""
    if problem.tokens == 0:
        return
    w = sorted_rows(problem, config, t)
    work = (w["sorted_slots"], w["tiles"], w["tile_count"])
    most = most_tiles(problem, config)
    multiply(
        config.fc1,
        most,
        t.x,
        t.w13,
        w["mid"],
        work,
        bias=t.b13,
        params=(t.alpha, t.beta, t.limit),
        top_k=problem.top_k,
        gather=True,
        activation=problem.activation,
    )
    multiply(config.fc2, most, w["mid"], t.w2, w["y"], work, bias=t.b2, scatter=True, early=True)
    combine.combine(w["y"], t.ids, t.weights, t.out, problem.experts, problem.expert_offset)
