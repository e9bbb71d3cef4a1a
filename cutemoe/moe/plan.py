"""Back ends of `route` and `fused_moe`: why each refuses a problem, and its configuration."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from cutemoe.gemm import cute_plan
from cutemoe.gemm.plan import WeightForm, choose_rows, choose_tile, refuse_weights
from cutemoe.moe import cute_nvfp4_plan
from cutemoe.moe.problem import Problem
from cutemoe.moe.routing import RouteProblem
from cutemoe.runtime import tune
from cutemoe.runtime.backend import Backend, never, triton_unavailable
from cutemoe.runtime.compile import cute_unavailable
from cutemoe.runtime.device import Device

TRITON_WEIGHTS = {
    "bf16": ("bf16",),
    "fp16": ("fp16",),
    "mxfp4": ("bf16", "fp16", "fp8"),
    "int4": ("bf16", "fp16", "fp8"),
    "nvfp4": ("bf16", "fp16", "fp8", "nvfp4"),
}
MAX_TOP_K = 32
MAX_EXPERTS = 1024
MAX_ROWS = 2**31 - 1


@dataclass(frozen=True)
class MoEConfig:
    """Tiles of both GEMMs; both have the same rows.

    Attributes:
        block_m: routed rows a tile, at least workspace.MIN_TILE_ROWS.
        fc1, fc2: tiles of w13 and w2, GemmConfig of the Triton back end or Tile of the CuTe one.
    """

    block_m: int
    fc1: Any
    fc2: Any


@dataclass(frozen=True)
class RouteConfig:
    """Shape of the routing kernel: tokens a program, experts padded to a power of two, warps."""

    block_t: int
    block_e: int
    warps: int


def refuse_triton(problem: Problem, device: Device) -> str | None:
    """Why the Triton kernels do not run this layer, or None."""
    return refuse_weights(problem, TRITON_WEIGHTS, "activations") or _refuse_routing(problem)


def refuse_cute(problem: Problem, device: Device) -> str | None:
    """Why the CuTe kernels do not run this layer, or None."""
    why = cute_plan.refuse(problem.weight, problem.activations, problem.layout)
    return why or cute_nvfp4_plan.refuse_rounding(problem) or _refuse_routing(problem)


@tune.kept
def configure_cute(problem: Problem, device: Device) -> MoEConfig:
    """Tiles for the CuTe kernels: measured ones where the table has the layer, else chosen."""
    found = tune.find("fused_moe", device, *_tuned_key(problem))
    if found is None:
        recipe = _recipe(problem)
        mean = problem.tokens * problem.top_k / problem.experts
        return _cute_tiles(problem, device, cute_plan.choose_rows(mean, recipe))
    fc1, fc2 = (
        cute_plan.Tile(**{**found[name], "rows": tuple(found[name]["rows"])})
        for name in ("fc1", "fc2")
    )
    return MoEConfig(found["block_m"], fc1, fc2)


def _recipe(p: Problem) -> cute_plan.Recipe:
    return cute_plan.Recipe(p.weight, p.group_size or 0, p.activations)


def _tuned_key(p: Problem) -> tuple[dict[str, Any], int]:
    """What a row of the table of tuned configurations is for, and its size: tokens.

    The heuristic's rows are part of it: calls with other ones are unlike, however near in size.
    """
    names = ("weight", "group_size", "activations", "gated")
    names += ("hidden", "intermediate", "experts", "top_k")
    shape = {name: getattr(p, name) for name in names}
    rows = cute_plan.choose_rows(p.tokens * p.top_k / p.experts, _recipe(p))
    return {**shape, "rows": " ".join(map(str, rows))}, p.tokens


def _cute_passes(problem: Problem, device: Device) -> tuple[tune.Vary, ...]:
    """Rows of a tile, then how FC1 and how FC2 cut the weights."""
    recipe = _recipe(problem)

    def rows(c: MoEConfig) -> list[MoEConfig]:
        near = cute_plan.near_rows(recipe, c.fc1.rows)
        return [_cute_tiles(problem, device, r) for r in near]

    def fc1(c: MoEConfig) -> list[MoEConfig]:
        return [replace(c, fc1=t) for t in cute_plan.other_tiles(recipe, c.fc1)]

    def fc2(c: MoEConfig) -> list[MoEConfig]:
        return [replace(c, fc2=t) for t in cute_plan.other_tiles(recipe, c.fc2)]

    return rows, fc1, fc2


def _cute_tiles(problem: Problem, device: Device, rows: tuple[int, ...]) -> MoEConfig:
    """Tiles of these rows, from the experts that can be expected."""
    p, recipe = problem, _recipe(problem)
    share = min(p.top_k / p.experts, 1.0)
    active = p.experts * (1.0 - (1.0 - share) ** p.tokens)
    outputs = (p.intermediate * (2 if p.gated else 1), p.hidden)
    fc1, fc2 = (
        cute_plan.choose_tile(recipe, rows, active, math.ceil(n / 64), device) for n in outputs
    )
    return MoEConfig(rows[-1], fc1, fc2)


def _refuse_routing(problem: Problem) -> str | None:
    """Why the kernels that sort and combine do not take this routing, or None."""
    if problem.top_k > MAX_TOP_K:
        return f"top_k <= {MAX_TOP_K}, got {problem.top_k}"
    if problem.experts > MAX_EXPERTS:
        return f"local experts <= {MAX_EXPERTS}, got {problem.experts}"
    if problem.tokens * problem.top_k > MAX_ROWS:
        return f"tokens * top_k <= {MAX_ROWS}, got {problem.tokens * problem.top_k}"
    return None


@lru_cache(maxsize=1024)
def configure_triton(problem: Problem, device: Device) -> MoEConfig:
    """Tiles for the Triton kernels, from the rows that an expert can expect."""
    p = problem
    rows = p.tokens * p.top_k
    both = math.gcd(p.hidden, p.intermediate)
    form = WeightForm(p.weight, p.group_size, p.layout, p.activations, both)
    block_m = choose_rows(form, rows / p.experts, device)
    active = min(rows, p.experts)
    n13 = p.intermediate * (2 if p.gated else 1)
    fc1, fc2 = (choose_tile(form, block_m, active * n, device) for n in (n13, p.hidden))
    return MoEConfig(block_m, fc1, fc2)


def refuse_route(problem: RouteProblem, device: Device) -> str | None:
    """Why the Triton kernel does not run this routing, or None."""
    if problem.experts > MAX_EXPERTS:
        return f"experts <= {MAX_EXPERTS}, got {problem.experts}"
    return None


def configure_route(problem: RouteProblem, device: Device) -> RouteConfig:
    """A warp for up to 512 scores: reductions within a warp need no shared memory."""
    block_e = max(16, 1 << (problem.experts - 1).bit_length())
    block_t = max(1, 128 // block_e) if problem.tokens > 64 else 1
    return RouteConfig(block_t, block_e, 1 if block_t * block_e <= 512 else 2)


BACKENDS = (
    Backend(
        "cute",
        "cutemoe.moe.cute_launch:run",
        cute_plan.unavailable,
        refuse_cute,
        configure_cute,
        tuning=tune.Tuning(_tuned_key, _cute_passes, asdict),
        replays=True,
    ),
    Backend(
        "cute_nvfp4",
        "cutemoe.moe.cute_nvfp4_launch:run",
        cute_unavailable,
        cute_nvfp4_plan.refuse,
        cute_nvfp4_plan.configure,
    ),
    Backend(
        "cute_nvfp4_pipeline",
        "cutemoe.moe.cute_nvfp4_launch:run",
        cute_unavailable,
        cute_nvfp4_plan.refuse,
        cute_nvfp4_plan.configure_pipeline,
        variant=True,
    ),
    Backend(
        "cute_nvfp4_static",
        "cutemoe.moe.cute_nvfp4_launch:run",
        cute_unavailable,
        cute_nvfp4_plan.refuse,
        cute_nvfp4_plan.configure_static,
        variant=True,
    ),
    Backend(
        "cute_nvfp4_dynamic",
        "cutemoe.moe.cute_nvfp4_launch:run",
        cute_unavailable,
        cute_nvfp4_plan.refuse,
        cute_nvfp4_plan.configure_dynamic,
        variant=True,
    ),
    Backend(
        "cute_nvfp4_emulated",
        "cutemoe.moe.cute_nvfp4_launch:run",
        cute_unavailable,
        cute_nvfp4_plan.refuse_emulated,
        cute_nvfp4_plan.configure_emulated,
        variant=True,
    ),
    Backend(
        "triton",
        "cutemoe.triton_kernels.moe:run",
        triton_unavailable,
        refuse_triton,
        configure_triton,
        replays=True,
    ),
    Backend("reference", "cutemoe.moe.reference:run", never, never),
)

ROUTE_BACKENDS = (
    Backend(
        "triton",
        "cutemoe.triton_kernels.route:run",
        triton_unavailable,
        refuse_route,
        configure_route,
        replays=True,
    ),
    Backend("reference", "cutemoe.moe.routing:run", never, never),
)
