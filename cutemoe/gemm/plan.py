"""Back ends of `grouped_gemm`: why each refuses a problem, and its configuration."""

from __future__ import annotations

from dataclasses import dataclass

from cutemoe.gemm.problem import GemmProblem
from cutemoe.runtime.backend import Backend, never, triton_unavailable
from cutemoe.runtime.device import Device

TRITON_WEIGHTS = {
    "bf16": ("bf16",),
    "fp16": ("fp16",),
    "mxfp4": ("bf16", "fp16", "fp8"),
    "int4": ("bf16", "fp16", "fp8"),
    "nvfp4": ("bf16", "fp16", "fp8"),
}
MAX_GROUPS = 1024
MAX_ROWS = 2**31 - 1


@dataclass(frozen=True)
class GemmConfig:
    """Tiles of the Triton back end: rows, outputs, K step, warps, pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def refuse_triton(problem: GemmProblem, device: Device) -> str | None:
    """Why the Triton kernel does not run this problem, or None."""
    if problem.layout != "rows":
        return f"weights in layout 'rows', got {problem.layout!r}"
    known = TRITON_WEIGHTS.get(problem.weight)
    if known is None:
        return f"weights in one of {', '.join(TRITON_WEIGHTS)}, got {problem.weight}"
    if problem.activations not in known:
        return f"{problem.weight} weights take x in {known}, got {problem.activations!r}"
    if problem.groups > MAX_GROUPS:
        return f"groups <= {MAX_GROUPS}, got {problem.groups}"
    if problem.rows > MAX_ROWS:
        return f"rows <= {MAX_ROWS}, got {problem.rows}"
    if problem.activations == "fp8" and device.type == "cuda" and device.arch < 89:
        return f"fp8 x needs sm_89 or newer, got sm_{device.arch}"
    return None


def configure_triton(problem: GemmProblem, device: Device) -> GemmConfig:
    """Tiles for the Triton kernel: a row tile near the mean rows of a group."""
    mean = -(-problem.rows // problem.groups)
    block_m = next((b for b in (16, 32, 64) if b >= mean), 128)
    return GemmConfig(block_m, 64, 128, 4, 3)


BACKENDS = (
    Backend(
        "triton",
        "cutemoe.triton_kernels.grouped_gemm:run",
        triton_unavailable,
        refuse_triton,
        configure_triton,
    ),
    Backend("reference", "cutemoe.gemm.reference:run", never, never),
)
