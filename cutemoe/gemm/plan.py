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
    """Tile of the Triton kernel: rows, rows of w, K step of dense weights, warps, stages."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


def packed_layout(activations: str) -> str:
    """The packed layout of 4-bit weights for these activations.

    Quantised activations are exact in bf16, and bf16 holds every scaled weight.
    """
    return "sm80_w4_fp16" if activations == "fp16" else "sm80_w4_bf16"


def weight_layout(activations: str, backend: str, device: Device) -> str:
    """The layout of weights for the back end that will run them: packed for Triton."""
    willing = triton_unavailable(device) is None and (backend == "triton" or device.type == "cuda")
    return packed_layout(activations) if willing and backend != "reference" else "rows"


def refuse_layout(layout: str, activations: str) -> str | None:
    """Why the Triton kernels do not run this layout with these activations, or None."""
    known = ("rows", packed_layout(activations))
    if layout not in known:
        return f"weights in layout {' or '.join(known)}, got {layout!r}"
    return None


def refuse_triton(problem: GemmProblem, device: Device) -> str | None:
    """Why the Triton kernel does not run this problem, or None."""
    if (why := refuse_layout(problem.layout, problem.activations)) is not None:
        return why
    known = TRITON_WEIGHTS.get(problem.weight)
    if known is None:
        return f"weights in one of {', '.join(TRITON_WEIGHTS)}, got {problem.weight}"
    if problem.activations not in known:
        return f"{problem.weight} weights take x in {known}, got {problem.activations!r}"
    if problem.groups > MAX_GROUPS:
        return f"groups <= {MAX_GROUPS}, got {problem.groups}"
    if problem.rows > MAX_ROWS:
        return f"rows <= {MAX_ROWS}, got {problem.rows}"
    return None


def configure_triton(problem: GemmProblem, device: Device) -> GemmConfig:
    """Tile for the Triton kernel, from the rows that a group can expect."""
    return choose_tile(problem.rows, problem.groups, problem.weight, problem.layout, device)


def choose_tile(rows: int, groups: int, weight: str, layout: str, device: Device) -> GemmConfig:
    """Tile for `rows` rows that fall on `groups` groups at random."""
    mean = rows / groups
    block_m = next((m for m, most in ((8, 3), (16, 10), (32, 24), (64, 64)) if mean <= most), 128)
    if layout == "rows" and weight in ("mxfp4", "nvfp4", "int4"):
        return GemmConfig(max(16, min(block_m, 64)), 64, 32, 4, 3)
    if weight in ("bf16", "fp16"):
        return GemmConfig(max(16, block_m), 128, 64, 4 if block_m < 128 else 8, 3)
    return GemmConfig(block_m, 128, 128, 4 if block_m <= 32 else 8, 4 if block_m == 16 else 3)


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
