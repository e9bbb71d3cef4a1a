"""From a validated layer call to the launches of the CuTe kernels.

| stage | reads | writes |
|---|---|---|
| sort | ids | sorted_slots, expert_start, tiles, tile_count; zeros to sync |
| quantise | x by sorted_slots // K | xq and its scales, in sorted order |
| FC1 | xq, w13 | midq and its scales, in sorted order |
| FC2 | midq, w2, weights | y in slot order, some columns at once; out |

With 16-bit activations there is no quantise; FC1 reads x by sorted_slots // K and writes mid.

Style "pipeline" launches every stage; grids are bounds that the host knows, and CTAs beyond the
live tiles exit; each kernel after the first starts while the one before it ends. "static" and
"dynamic" are one cooperative launch, after one that zeroes its counters. "external" is not ours
(`hybrid.plug_prefill`). No synchronisation with the host.

x is quantised for each slot, not for each token: multipliers may differ between experts, and sorted
rows need no gather in FC1.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from cutemoe.errors import Unsupported
from cutemoe.moe.cute_nvfp4_build import (
    build_fc1,
    build_fc2,
    build_fused,
    build_quantise,
    build_sort,
)
from cutemoe.moe.cute_nvfp4_plan import (
    BLOCK_N,
    COMBINERS,
    FC2Config,
    FusedConfig,
    Nvfp4Config,
    most_tiles,
)
from cutemoe.moe.problem import Problem
from cutemoe.moe.tensors import MoETensors
from cutemoe.moe.workspace import layout_of
from cutemoe.runtime.compile import compiled

sort = compiled(build_sort)
quantise = compiled(build_quantise)
fc1 = compiled(build_fc1)
fc2 = compiled(build_fc2)
fused = compiled(build_fused)


def run(problem: Problem, config: Nvfp4Config, t: MoETensors) -> None:
    """The CuTe back end of `fused_moe` for weights in NVFP4 and MXFP4.

    Raises:
        Unsupported: the codes of the weights are not aligned to 16 bytes.
        InvalidCall: a kernel is not compiled yet and a CUDA graph is being captured.
    """
    if config.prefill is not None:
        config.prefill.run(problem, t)
        return
    for name, weight in (("w13", t.w13), ("w2", t.w2)):
        if weight.data.data_ptr() % 16:
            raise Unsupported(f"{name}: back end 'cute_nvfp4' takes codes aligned to 16 bytes")
    plan = _layout(problem)
    w = plan.views(t.scratch(plan.nbytes))
    if config.style == "pipeline":
        _pipeline(problem, complete(config, t), t, w)
    else:
        _fused(problem, complete(config, t), config.ctas, t, w)


_layout = lru_cache(maxsize=256)(layout_of)


def complete(c: Nvfp4Config, t: MoETensors) -> FusedConfig:
    """What the kernels are compiled for, with what only the tensors show."""
    return _complete(
        c,
        t.ids.is_contiguous(),
        (_aligned(t.x, 16), _aligned(t.out, 8)),
        (t.w13.factor is not None, t.w2.factor is not None),
        tuple(isinstance(p, torch.Tensor) for p in (t.alpha, t.beta, t.limit)),
    )


@lru_cache(maxsize=1024)
def _complete(
    c: Nvfp4Config,
    flat: bool,
    wide: tuple[bool, bool],
    factors: tuple[bool, bool],
    each: tuple[bool, ...],
) -> FusedConfig:
    alpha_e, beta_e, limit_e = each
    return FusedConfig(
        sort=replace(c.sort, flat=flat),
        quantise=replace(c.rows, flat=flat, wide=wide[0]),
        fc1=replace(
            c.fc1,
            factor=factors[0],
            alpha_e=alpha_e,
            beta_e=beta_e,
            limit_e=limit_e,
            wide=wide[0] or not c.fc1.numbers,
        ),
        fc2=FC2Config(replace(c.fc2, factor=factors[1]), replace(c.rows, wide=wide[1])),
        dynamic=c.style == "dynamic",
    )


def _pipeline(problem: Problem, c: FusedConfig, t: MoETensors, w: dict[str, torch.Tensor]) -> None:
    """One launch a stage."""
    offset, experts, block_m = problem.expert_offset, problem.experts, c.fc1.tile.block_m
    rows = (w["sorted_slots"], w["expert_start"], w["tiles"], w["tile_count"])
    tiles = (w["tiles"], w["tile_count"], w["sorted_slots"])
    most = most_tiles(problem, block_m)
    sort(c.sort)(t.ids, rows, w["sync"], offset, experts, block_m)
    if c.fc1.numbers:
        of_x, of_mid, result = (t.x, problem.top_k), (w["mid"], None), (w["mid"],)
    else:
        xq, mid = _codes(w, "xq"), _codes(w, "midq")
        of_x, of_mid, result = (xq[0], xq[3]), (mid[0], mid[3]), (mid[2], mid[1])
        quantise(c.quantise)(t.x, t.ids, rows[0], rows[1], t.input_scale1, xq[2], xq[1], offset)
    fc1(c.fc1)(
        (*of_x, t.w13.data, _scales(t.w13.scale)),
        tiles,
        _multipliers(t.w13.factor, t.input_scale1, t.input_scale2),
        t.b13,
        _params(t),
        result,
        most * -(-problem.intermediate // c.fc1.outputs),
    )
    y, combiners = w["y"], _combiners(problem, c, w["y"])
    columns = y.shape[1]
    items = most * -(-columns // BLOCK_N) + combiners
    fc2(c.fc2)(
        (*of_mid, t.w2.data, _scales(t.w2.scale)),
        tiles,
        _multipliers(t.w2.factor, t.input_scale2),
        t.b2,
        y,
        (t.ids, t.weights, t.out),
        w["sync"],
        (offset, experts, combiners),
        items * -(-problem.hidden // columns),
    )


def _combiners(problem: Problem, c: FusedConfig, y: torch.Tensor) -> int:
    """CTAs that share the sums of a part of y."""
    quads = problem.tokens * y.shape[1] // 4
    return min(-(-quads // c.fc1.tile.threads), COMBINERS)


def _fused(
    problem: Problem, c: FusedConfig, ctas: int, t: MoETensors, w: dict[str, torch.Tensor]
) -> None:
    """All stages in one launch."""
    block_m = c.fc1.tile.block_m
    rows = (w["sorted_slots"], w["expert_start"], w["tiles"], w["tile_count"])
    w["sync"].zero_()
    fused(c)(
        (t.x, t.ids, t.weights, t.out, w["y"]),
        rows,
        None if c.fc1.numbers else _codes(w, "xq"),
        (
            t.w13.data,
            _scales(t.w13.scale),
            t.w13.factor,
            t.input_scale1,
            t.input_scale2,
            t.b13,
            _params(t),
        ),
        (w["mid"],) if c.fc1.numbers else _codes(w, "midq"),
        (t.w2.data, _scales(t.w2.scale), t.w2.factor, t.b2),
        w["sync"],
        (problem.expert_offset, problem.experts, _combiners(problem, c, w["y"]), block_m),
        ctas,
    )


def _params(t: MoETensors) -> tuple[Any, ...]:
    """alpha, beta and limit of the activation; a limit that does not exist is not read."""
    return t.alpha, t.beta, 0.0 if t.limit is None else t.limit


def _multipliers(*each: torch.Tensor | None) -> tuple[torch.Tensor | None, ...] | None:
    """Multipliers of a GEMM; None where there are none, as in mxfp4."""
    return None if all(m is None for m in each) else each


def _codes(w: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, ...]:
    """Codes and scales as bytes, then both as words."""
    codes, scales = w[name], w[f"{name}_scale"]
    return codes, scales, codes.view(torch.int32), scales.view(torch.int32)


def _aligned(x: torch.Tensor, nbytes: int) -> bool:
    """Every row of x starts at a multiple of nbytes."""
    return x.data_ptr() % nbytes == 0 and x.stride(0) * x.element_size() % nbytes == 0


def _scales(x: torch.Tensor | None) -> torch.Tensor | None:
    """Swizzled scales [E, ..] as int32 [E, words]."""
    return None if x is None else x.view(torch.int32).flatten(1)
