"""Back ends of `grouped_gemm`: why each refuses a problem, and its configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cutemoe.gemm import cute_plan
from cutemoe.gemm.problem import GemmProblem
from cutemoe.gemm.weight import SM120
from cutemoe.runtime.backend import Backend, never, triton_unavailable
from cutemoe.runtime.compile import cute_unavailable
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


def weight_layout(format: str, activations: str, backend: str, device: Device) -> str:
    """The layout of weights for the back end that will run them: the first that takes them."""
    # elsewhere these kernels emulate the MMA of SM120 and run by name, or where nothing else does
    best = device.arch in (120, 121) or activations == "mxfp4"
    asked = backend.startswith("cute_nvfp4")
    named = asked or (backend == "auto" and best)
    if cute_unavailable(device) is None:
        if named and activations in ("nvfp4", "mxfp4"):
            return SM120 if format == activations else "rows"
        if asked and format == "nvfp4" and activations in ("bf16", "fp16"):
            return SM120
    if activations == "mxfp4":
        return "rows"
    why = cute_plan.unavailable(device) or cute_plan.refuse_format(format, activations)
    if backend in ("auto", "cute") and why is None:
        return cute_plan.LAYOUTS[activations]
    willing = triton_unavailable(device) is None and (backend == "triton" or device.type == "cuda")
    return packed_layout(activations) if willing and backend in ("auto", "triton") else "rows"


def refuse_layout(layout: str, activations: str) -> str | None:
    """Why the Triton kernels do not run this layout with these activations, or None."""
    known = ("rows", packed_layout(activations))
    if layout not in known:
        return f"weights in layout {' or '.join(known)}, got {layout!r}"
    return None


def refuse_weights(
    problem: Any, weights: Mapping[str, tuple[str, ...]], operand: str
) -> str | None:
    """Why these weights and activations do not go together in the Triton kernels, or None."""
    if (why := refuse_layout(problem.layout, problem.activations)) is not None:
        return why
    known = weights.get(problem.weight)
    if known is None:
        return f"weights in one of {', '.join(weights)}, got {problem.weight}"
    if problem.activations not in known:
        return f"{problem.weight} weights take {operand} {known}, got {problem.activations!r}"
    return None


def refuse_triton(problem: GemmProblem, device: Device) -> str | None:
    """Why the Triton kernel does not run this problem, or None."""
    return refuse_weights(problem, TRITON_WEIGHTS, "x in") or _refuse_sizes(problem)


def _refuse_sizes(problem: GemmProblem) -> str | None:
    """Why the kernels that tile the rows do not take so many, or None."""
    if problem.groups > MAX_GROUPS:
        return f"groups <= {MAX_GROUPS}, got {problem.groups}"
    if problem.rows > MAX_ROWS:
        return f"rows <= {MAX_ROWS}, got {problem.rows}"
    return None


@lru_cache(maxsize=1024)
def configure_triton(problem: GemmProblem, device: Device) -> GemmConfig:
    """Tile for the Triton kernel, from the rows that a group can expect."""
    p, active = problem, min(problem.rows, problem.groups)
    form = WeightForm(p.weight, p.group_size, p.layout, p.activations, p.k)
    return choose_tile(form, choose_rows(form, p.rows / p.groups, device), active * p.n, device)


@dataclass(frozen=True)
class WeightForm:
    """What of the weights and of x matters to a tile; k: inputs, or what divides those of both."""

    weight: str
    group_size: int | None
    layout: str
    activations: str
    k: int

    @property
    def dense(self) -> bool:
        """16-bit values."""
        return self.weight in ("bf16", "fp16")

    @property
    def partial(self) -> bool:
        """Scales multiply partial sums, which need registers of their own."""
        return self.weight == "int4" or (self.weight == "mxfp4" and self.activations == "fp16")

    @property
    def slim(self) -> bool:
        """128 rows leave registers for the rest on sm_90; otherwise 64 do."""
        if self.partial:
            return self.weight == "int4" and self.group_size != 32
        return self.k % 128 == 0


def choose_rows(form: WeightForm, mean: float, device: Device) -> int:
    """Rows of a tile where a group can expect `mean` rows.

    Measured on one H200, 2026-11, mxfp4 and int4, h 4096 i 2048 and h i 2880: 8 rows are best up to
    a mean of 6 (what overflows reads the weights from the L2 cache again), 16 up to 16, 32 up to
    32, 64 up to 72. Other cards: compiled only.
    """
    m = next((m for m, most in ((8, 6), (16, 16), (32, 32), (64, 72)) if mean <= most), 128)
    most = 128 if device.arch == 90 and (form.slim or form.dense) else 64
    least = 16 if form.dense or form.layout == "rows" else 8
    return max(least, min(m, 64 if form.layout == "rows" and not form.dense else most))


def choose_tile(form: WeightForm, block_m: int, outputs: int, device: Device) -> GemmConfig:
    """The tile of that many rows; `outputs`: rows of w of all groups that can be active."""
    if form.dense:
        return GemmConfig(block_m, 128, 64, 8 if block_m == 128 else 4, 3)
    if form.layout == "rows":
        return GemmConfig(block_m, 64, 32, 4, 3)
    if block_m == 8 and outputs < 2 * 128 * device.sm_count:
        # too few programs of 128 outputs to fill the card
        return GemmConfig(8, 32, 128, 2, 4)
    block_n = 64 if form.partial and block_m >= 64 else 128
    # off sm_90 the sums of other instructions leave fewer registers
    wide = device.arch != 90 and block_m >= (32 if form.partial else 64)
    return GemmConfig(block_m, block_n, 128, 8 if wide else 4, 4 if block_m == 16 else 3)


@lru_cache(maxsize=1024)
def configure_cute(problem: GemmProblem, device: Device) -> cute_plan.Tile:
    """Tile of the CuTe kernel, from the rows that a group can expect."""
    p = problem
    recipe = cute_plan.Recipe(p.weight, p.group_size or 0, p.activations)
    rows = cute_plan.choose_rows(p.rows / p.groups, recipe)
    active = min(p.rows, p.groups)
    return cute_plan.choose_tile(recipe, rows, active, math.ceil(p.n / 64), device)


def refuse_cute(problem: GemmProblem, device: Device) -> str | None:
    """Why the CuTe kernel does not run this problem, or None."""
    why = cute_plan.refuse(problem.weight, problem.activations, problem.layout)
    return why or _refuse_sizes(problem)


BACKENDS = (
    Backend(
        "cute",
        "cutemoe.gemm.cute_launch:run",
        cute_plan.unavailable,
        refuse_cute,
        configure_cute,
        replays=True,
    ),
    Backend(
        "triton",
        "cutemoe.triton_kernels.grouped_gemm:run",
        triton_unavailable,
        refuse_triton,
        configure_triton,
        replays=True,
    ),
    Backend("reference", "cutemoe.gemm.reference:run", never, never),
)
