"""The Triton back end of `grouped_gemm`, and the launch of `expert_gemm` that the layer shares."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import triton

from cutemoe.gemm.problem import GemmProblem
from cutemoe.gemm.tensors import GemmTensors
from cutemoe.gemm.weight import PackedWeight
from cutemoe.layouts import sm80_w4
from cutemoe.triton_kernels import launch, quantize, sort
from cutemoe.triton_kernels.expert_gemm import Spec, expert_gemm

if TYPE_CHECKING:
    from cutemoe.gemm.plan import GemmConfig


def spec_of(weight: PackedWeight, config: GemmConfig, x: torch.Tensor, **given: Any) -> Spec:
    """What the kernel is compiled for; `given` holds the fields that differ from a plain GEMM."""
    return _spec(
        "dense" if weight.scale is None else weight.format,
        weight.group_size or 0,
        weight.layout != "rows",
        x.dtype == torch.float16,
        weight.factor is not None,
        weight.shape[2],
        _is_wide(x, weight, config.block_m),
        config,
        tuple(given.items()),
    )


@lru_cache(maxsize=4096)
def _spec(
    weight: str,
    group: int,
    packed: bool,
    fp16: bool,
    factor: bool,
    k: int,
    wide: bool,
    config: GemmConfig,
    given: tuple[tuple[str, Any], ...],
) -> Spec:
    fields: dict[str, Any] = {
        "weight": weight,
        "group": group,
        "packed": packed,
        "fp16": fp16,
        "divide": 0,
        "scatter": False,
        "token_scale": False,
        "expert_scale": False,
        "factor": factor,
        "bias": False,
        "activation": "none",
        "order": "gate_up",
        "alpha_e": False,
        "beta_e": False,
        "limit_e": False,
        "limit": False,
        "eager": False,
        "zero_tail": False,
        "min_step": 32 if weight == "dense" else min(sm80_w4.steps(k)),
        "block_m": config.block_m,
        "block_n": config.block_n,
        "block_k": config.block_k,
        "stages": config.stages,
        "wide": wide,
        "portable": launch.portable(),
    }
    return Spec(**(fields | dict(given)))


def _is_wide(x: torch.Tensor, weight: PackedWeight, block_m: int) -> bool:
    """Row offsets of x, or in the weights of one expert, pass 2^31; or 64 bits are no slower.

    At 8 rows they are not, and ptxas gives the kernel fewer registers.
    """
    _, n, k = weight.shape
    large = x.shape[0] * x.stride(0) >= 2**31 or sm80_w4.padded(n) * k >= 2**31
    return large or block_m == 8


def multiply(
    spec: Spec,
    warps: int,
    tiles: int,
    x: torch.Tensor,
    weight: PackedWeight,
    out: torch.Tensor,
    sorted_rows: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor],
    *,
    token_scale: torch.Tensor | None = None,
    expert_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    alpha: float | torch.Tensor = 1.0,
    beta: float | torch.Tensor = 0.0,
    limit: float | torch.Tensor | None = None,
) -> None:
    """Launches `expert_gemm` for at most `tiles` tiles of rows.

    Args:
        sorted_rows: sorted_slots, tiles and tile_count of sort.py.
        x: [.., K] bf16 or fp16; out: [.., outputs]; last dimensions contiguous.
    """
    _, n, k = weight.shape
    outputs = n // 2 if spec.gated else n
    scale = weight.scale
    if scale is not None and scale.dtype == torch.float8_e4m3fn:
        scale = scale.view(torch.uint8)
    expert_gemm[(tiles * triton.cdiv(outputs, spec.outputs),)](
        x,
        token_scale,
        weight.data,
        scale,
        weight.factor,
        expert_scale,
        bias,
        *sorted_rows,
        out,
        alpha,
        beta,
        0.0 if limit is None else limit,
        k,
        n,
        x.stride(0),
        out.stride(0),
        spec,
        **launch.options(warps, spec.stages),
    )


def run(problem: GemmProblem, config: GemmConfig, t: GemmTensors) -> None:
    """The Triton back end of `grouped_gemm`."""
    if problem.rows == 0:
        return
    x, device = t.x, t.x.device
    if x.dtype == torch.float8_e4m3fn:
        x = torch.empty(x.shape, dtype=torch.bfloat16, device=device)
        quantize.widen(t.x, x)
    # rows of no group are one more group, and its tile writes zeros
    groups = problem.groups + 1
    most = min(groups, problem.rows) + problem.rows // config.block_m
    count, tiles = t.tiles(most)
    sort.sort_groups(t.offsets, problem.rows, config.block_m, tiles, count)
    scale = t.x_scale
    if scale is not None and problem.x_scale == "tensor":
        scale = scale.expand(problem.groups).contiguous()
    per_row = scale if problem.x_scale == "row" else None
    per_group = scale if problem.x_scale == "tensor" else None
    spec = spec_of(
        t.w,
        config,
        x,
        zero_tail=True,
        token_scale=per_row is not None,
        expert_scale=per_group is not None,
    )
    rows = (None, tiles, count)
    multiply(
        spec,
        config.warps,
        most,
        x,
        t.w,
        t.out,
        rows,
        token_scale=per_row,
        expert_scale=per_group,
    )
