"""From validated tensors to launches of the Hopper kernel; the one launch that both ops share."""

from __future__ import annotations

from typing import Any

import torch

from cutemoe.gemm.cute_build import build
from cutemoe.gemm.cute_plan import Config, Recipe, Tile
from cutemoe.gemm.problem import GemmProblem
from cutemoe.gemm.tensors import GemmTensors
from cutemoe.gemm.weight import HOPPER, PackedWeight
from cutemoe.runtime import replay
from cutemoe.runtime.compile import compiled
from cutemoe.runtime.device import Device
from cutemoe.triton_kernels import sort

kernel = compiled(build)
OUT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
IDS = {torch.int32: "int32", torch.int64: "int64"}


def multiply(
    tile: Tile,
    tiles: int,
    x: torch.Tensor,
    w: PackedWeight,
    out: torch.Tensor,
    work: tuple[Any, ...],
    *,
    x_scale: tuple[str, torch.Tensor | None] = ("none", None),
    bias: torch.Tensor | None = None,
    params: tuple[Any, Any, Any] = (1.0, 0.0, None),
    top_k: int = 1,
    **given: Any,
) -> None:
    """Launches the kernel for at most `tiles` tiles of rows.

    Args:
        work: slots of the sorted rows, tiles and their count, as sort.py writes them; or ids and
            expert_offset, for the kernel to sort.
        params: alpha, beta and limit of the activation, numbers or float32 [E].
        x_scale: what multiplies the sums: Config's word for it, and the tensor.
        given: other fields of the kernel's Config.
    """
    config = Config(
        Recipe(w.format, w.group_size or 0, HOPPER[w.layout]),
        tile,
        out=OUT[out.dtype],
        bias=bias is not None,
        factor=w.factor is not None,
        x_scale=x_scale[0],
        params=(_given(params[0]), _given(params[1]), _given(params[2])),
        limit=params[2] is not None,
        order=w.order,
        ids=IDS[work[0].dtype] if len(work) == 2 else "",
        **given,
    )
    if not (config.ids or config.gather or config.scatter):
        work = (None, *work[1:])
    device = Device.of(x.device)
    blocks = -(-w.data.shape[1] // tile.row_blocks)
    replay.call(
        kernel(config), aligned(x), w.data, w.factor, x_scale[1], bias, work, out,
        tuple(0.0 if p is None else p for p in params), top_k,
        min(tiles * blocks, device.sm_count * tile.ctas),
    )  # fmt: skip


def _given(parameter: object) -> bool:
    return isinstance(parameter, torch.Tensor)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x with rows that start at multiples of 16 bytes: itself, or else a copy; fp8 as bytes."""
    if x.dtype == torch.float8_e4m3fn:
        x = x.view(torch.uint8)
    width, each = x.shape[1], 16 // x.element_size()
    if x.data_ptr() % 16 == 0 and x.stride(0) % each == 0:
        return x
    padded = torch.empty(x.shape[0], -(-width // each) * each, dtype=x.dtype, device=x.device)
    return padded[:, :width].copy_(x)


def run(problem: GemmProblem, tile: Tile, t: GemmTensors) -> None:
    """The CuTe back end of `grouped_gemm`."""
    if problem.rows == 0:
        return
    # rows of no group are one more group, and its tile writes zeros
    groups = problem.groups + 1
    most = min(groups, problem.rows) + problem.rows // tile.block_m
    count, list_ = t.tiles(most)
    sort.sort_groups(t.offsets, problem.rows, tile.block_m, list_, count)
    x_scale = problem.x_scale, t.x_scale
    if t.x_scale is not None and problem.x_scale == "tensor":
        x_scale = "expert", t.x_scale.expand(problem.groups).contiguous()
    work = (None, list_, count)
    multiply(tile, most, t.x, t.w, t.out, work, x_scale=x_scale, zero_tail=True)
