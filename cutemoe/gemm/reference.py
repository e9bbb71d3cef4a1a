"""The meaning of a grouped GEMM in torch; also the back end that runs anywhere."""

from __future__ import annotations

from itertools import pairwise

import torch

from cutemoe.gemm.problem import GemmProblem
from cutemoe.gemm.tensors import GemmTensors
from cutemoe.gemm.weight import PackedWeight

# rows of weights decoded at a time: they stay in the cache of a core
BLOCK = 256


def run(problem: GemmProblem, config: None, t: GemmTensors) -> None:
    """The torch back end. Reads the offsets on the host, so it waits for a GPU."""
    t.out.copy_(grouped_gemm_reference(problem, t))


def grouped_gemm_reference(
    problem: GemmProblem, t: GemmTensors, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """out[r, n] = x_scale[r] * factor[g] * sum over k of x[r, k] * w[g, n, k]; unrounded [R, N].

    g is the group with offsets[g] <= r < offsets[g+1], offsets clamped to [0, R]; a row of no group
    is zero. `dtype` is that of products and sums, float32 or float64.
    """
    out = torch.zeros(problem.rows, problem.n, dtype=dtype, device=t.x.device)
    starts = t.offsets.clamp(0, problem.rows).tolist()
    row_scale = None if t.x_scale is None else t.x_scale.to(dtype).expand(problem.rows)
    for g, (start, end) in enumerate(pairwise(starts)):
        if start >= end:
            continue
        y = multiply(t.x[start:end].to(dtype), t.w, g)
        if row_scale is not None:
            y *= row_scale[start:end, None]
        out[start:end] = y
    return out


def multiply(x: torch.Tensor, w: PackedWeight, group: int) -> torch.Tensor:
    """x [rows, Kdim] times the transposed weights of a group -> [rows, N], in the dtype of x."""
    w = w.group(group)
    blocks = [slice(i, i + BLOCK) for i in range(0, w.shape[1], BLOCK)]
    y = torch.cat([x @ w.values(rows, x.dtype).T for rows in blocks], dim=1)
    return y if w.factor is None else y * w.factor
