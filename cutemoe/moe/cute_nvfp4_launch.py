"""From a validated layer call to the launches of the CuTe kernels.

| launch | reads | writes |
|---|---|---|
| sort | ids | sorted_slots, expert_start, tiles, tile_count |
| quantise | x by sorted_slots // K | xq and its scales, in sorted order |
| FC1 | xq, w13 | midq and its scales, in sorted order |
| FC2 | midq, w2 | y in slot order |
| combine | y, weights | out |

Grids are bounds that the host knows; CTAs beyond the live tiles exit. No synchronisation.

x is quantised for each slot, not for each token: multipliers may differ between experts, and sorted
rows need no gather in FC1. y is float32 and in slot order, and not added up by atomics of FC2: the
sum of a token has one order and one rounding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cutemoe.errors import Unsupported
from cutemoe.moe.cute_nvfp4_build import (
    build_combine,
    build_fc1,
    build_fc2,
    build_quantise,
    build_sort,
)
from cutemoe.moe.cute_nvfp4_plan import GemmConfig, Nvfp4Config, RowsConfig, most_tiles
from cutemoe.moe.problem import Problem
from cutemoe.moe.tensors import MoETensors
from cutemoe.moe.workspace import layout_of
from cutemoe.runtime.compile import compiled

sort = compiled(build_sort)
quantise = compiled(build_quantise)
fc1 = compiled(build_fc1)
fc2 = compiled(build_fc2)
combine = compiled(build_combine)


def run(problem: Problem, config: Nvfp4Config, t: MoETensors) -> None:
    """The CuTe back end of `fused_moe` for NVFP4 weights and activations.

    Raises:
        Unsupported: the codes of the weights are not aligned to 16 bytes.
        InvalidCall: a kernel is not compiled yet and a CUDA graph is being captured.
    """
    for name, weight in (("w13", t.w13), ("w2", t.w2)):
        if weight.data.data_ptr() % 16:
            raise Unsupported(f"{name}: back end 'cute_nvfp4' takes codes aligned to 16 bytes")
    plan = layout_of(problem)
    buffer = t.workspace
    if buffer is None:
        buffer = torch.empty(plan.nbytes, dtype=torch.uint8, device=t.x.device)
    w = plan.views(buffer)
    offset, experts = problem.expert_offset, problem.experts
    flat = t.ids.is_contiguous()
    rows = (w["sorted_slots"], w["expert_start"], w["tiles"], w["tile_count"])
    tile = config.fc1.tile.block_m
    sort(replace(config.sort, flat=flat))(t.ids, rows, offset, experts, tile)
    quantise(_rows(config.rows, t.x, 16, flat))(
        t.x, t.ids, rows[0], rows[1], t.input_scale1, _words(w["xq"]), w["xq_scale"], offset
    )
    _gemms(problem, config, t, w)
    combine(_rows(config.rows, t.out, 8))(w["y"], t.ids, t.weights, t.out, offset, experts)


def _gemms(
    problem: Problem, config: Nvfp4Config, t: MoETensors, w: dict[str, torch.Tensor]
) -> None:
    """FC1 with activation, then FC2."""
    tiles = (w["tiles"], w["tile_count"], w["sorted_slots"])
    most = most_tiles(problem, config.fc1.tile.block_m)
    params: tuple[Any, ...] = (t.alpha, t.beta, 0.0 if t.limit is None else t.limit)
    each = (isinstance(p, torch.Tensor) for p in params)
    c1 = replace(
        config.fc1,
        factor=t.w13.factor is not None,
        **dict(zip(("alpha_e", "beta_e", "limit_e"), each, strict=True)),
    )
    fc1(c1)(
        (w["xq"], _words(w["xq_scale"]), t.w13.data, _scales(t.w13.scale)),
        tiles,
        (t.w13.factor, t.input_scale1, t.input_scale2),
        t.b13,
        params,
        (_words(w["midq"]), w["midq_scale"]),
        most * _blocks(problem.intermediate, c1),
    )
    c2 = replace(config.fc2, factor=t.w2.factor is not None)
    fc2(c2)(
        (w["midq"], _words(w["midq_scale"]), t.w2.data, _scales(t.w2.scale)),
        tiles,
        (t.w2.factor, t.input_scale2),
        t.b2,
        w["y"],
        most * _blocks(problem.hidden, c2),
    )


def _blocks(outputs: int, c: GemmConfig) -> int:
    """CTAs along the outputs."""
    return -(-outputs // c.outputs)


def _rows(c: RowsConfig, x: torch.Tensor, nbytes: int, flat: bool = True) -> RowsConfig:
    """The configuration with the alignment of the rows of x or out."""
    wide = x.data_ptr() % nbytes == 0 and x.stride(0) * x.element_size() % nbytes == 0
    return replace(c, flat=flat, wide=wide)


def _words(x: torch.Tensor) -> torch.Tensor:
    """Bytes [R, 4 n] as int32 [R, n]."""
    return x.view(torch.int32)


def _scales(x: torch.Tensor | None) -> torch.Tensor | None:
    """Swizzled scales [E, ..] as int32 [E, words]."""
    return None if x is None else x.view(torch.int32).flatten(1)
