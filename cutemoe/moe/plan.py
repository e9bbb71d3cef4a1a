"""Back ends of `route` and `fused_moe`: why each refuses a problem, and its configuration."""

from __future__ import annotations

from dataclasses import dataclass

from cutemoe.moe.problem import Problem
from cutemoe.moe.routing import RouteProblem
from cutemoe.runtime.backend import Backend, never, triton_unavailable
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
    """Tiles of both GEMMs of the Triton back end.

    Attributes:
        block_m: routed rows a tile, at least workspace.MIN_TILE_ROWS.
        block_n1, block_k1, warps1, stages1: FC1 output columns, K step, warps, pipeline stages.
        block_n2, block_k2, warps2, stages2: the same of FC2.
    """

    block_m: int
    block_n1: int
    block_k1: int
    warps1: int
    stages1: int
    block_n2: int
    block_k2: int
    warps2: int
    stages2: int


@dataclass(frozen=True)
class RouteConfig:
    """Shape of the routing kernel: tokens a program, experts padded to a power of two, warps."""

    block_t: int
    block_e: int
    warps: int


def refuse_triton(problem: Problem, device: Device) -> str | None:
    """Why the Triton kernels do not run this layer, or None."""
    if problem.layout != "rows":
        return f"weights in layout 'rows', got {problem.layout!r}"
    known = TRITON_WEIGHTS.get(problem.weight)
    if known is None:
        return f"weights in one of {', '.join(TRITON_WEIGHTS)}, got {problem.weight}"
    if problem.activations not in known:
        return f"{problem.weight} weights take activations {known}, got {problem.activations!r}"
    if problem.top_k > MAX_TOP_K:
        return f"top_k <= {MAX_TOP_K}, got {problem.top_k}"
    if problem.experts > MAX_EXPERTS:
        return f"local experts <= {MAX_EXPERTS}, got {problem.experts}"
    if problem.tokens * problem.top_k > MAX_ROWS:
        return f"tokens * top_k <= {MAX_ROWS}, got {problem.tokens * problem.top_k}"
    if problem.activations == "fp8" and device.type == "cuda" and device.arch < 89:
        return f"fp8 activations need sm_89 or newer, got sm_{device.arch}"
    return None


def configure_triton(problem: Problem, device: Device) -> MoEConfig:
    """Tiles for the Triton kernels: a row tile near the mean rows of an expert."""
    rows = problem.tokens * problem.top_k
    mean = -(-rows // problem.experts)
    block_m = next((b for b in (16, 32, 64) if b >= mean), 128)
    return MoEConfig(block_m, 64, 128, 4, 3, 64, 128, 4, 3)


def refuse_route(problem: RouteProblem, device: Device) -> str | None:
    """Why the Triton kernel does not run this routing, or None."""
    if problem.experts > MAX_EXPERTS:
        return f"experts <= {MAX_EXPERTS}, got {problem.experts}"
    return None


def configure_route(problem: RouteProblem, device: Device) -> RouteConfig:
    """One token a program; rows of up to 1024 experts fit the registers of four warps."""
    return RouteConfig(1, 1 << (problem.experts - 1).bit_length(), 4)


BACKENDS = (
    Backend(
        "triton",
        "cutemoe.triton_kernels.moe:run",
        triton_unavailable,
        refuse_triton,
        configure_triton,
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
    ),
    Backend("reference", "cutemoe.moe.routing:run", never, never),
)
