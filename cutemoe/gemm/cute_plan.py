"""What the Hopper kernel of the mixed-input GEMM is compiled for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cutemoe.layouts import sm90_rs_w4
from cutemoe.runtime.backend import triton_unavailable
from cutemoe.runtime.compile import cute_unavailable
from cutemoe.runtime.device import Device

LAYOUT = "sm90_rs_w4"
# shared memory that a CTA of sm_90 may have
SMEM_BYTES = 232448
# most tokens that an expert can expect -> sizes of a tile
ROWS = (
    (8.5, (8, 16)),
    (12.0, (8, 16, 24)),
    (25.0, (16, 24, 32, 40)),
    (33.0, (24, 32, 40, 48)),
    (52.0, (40, 56, 72)),
    (72.0, (56, 72, 88, 96)),
    (100.0, (80, 96, 112, 128)),
    (math.inf, (32, 64, 96, 128)),
)
# most tokens whose sums leave four warpgroups registers for the rest
MOST_ROWS_OF_FOUR = 48
# columns of a pipeline stage: two units of the weight layout
STAGE_UNITS = 2
STAGE_COLUMNS = STAGE_UNITS * sm90_rs_w4.COLUMNS


@dataclass(frozen=True)
class Tile:
    """How the work is cut.

    Attributes:
        rows: tokens a tile may have, ascending multiples of 8; a tile runs at the least that
            suffices, so that few tokens pay for few.
        warpgroups: of math, each with `blocks` blocks of 64 weight rows.
        stages: depth of the pipeline.
        ctas: that share a multiprocessor.
    """

    rows: tuple[int, ...]
    warpgroups: int
    blocks: int
    stages: int
    ctas: int

    @property
    def block_m(self) -> int:
        """Most tokens of a tile."""
        return self.rows[-1]

    @property
    def lag(self) -> int:
        """Stages that tokens may be on their way before the oldest is waited for."""
        return 1 if self.stages <= 6 else 2

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread that loads, and of one of math: what the launch gave, moved."""
        groups = self.warpgroups + 1
        # at launch every thread has the same, in steps of 8
        pool = 65536 // (128 * groups * self.ctas) // 8 * 8 * groups
        load = 40 if self.ctas == 1 or self.warpgroups == 1 else 32
        return load, min(240, (pool - load) // self.warpgroups // 8 * 8)

    @property
    def row_blocks(self) -> int:
        """Blocks of 64 weight rows of a CTA."""
        return self.warpgroups * self.blocks


def unavailable(device: Device) -> str | None:
    """Why the kernel does not run on this device, whatever the problem.

    wgmma is of sm_90a alone; Triton kernels sort the rows and combine them.
    """
    why = cute_unavailable(device) or triton_unavailable(device)
    if why is None and device.arch != 90:
        return f"needs sm_90, got sm_{device.arch}"
    return why


def refuse_format(weight: str, activations: str) -> str | None:
    """Why weights of this format and these activations do not go together in the kernel."""
    if weight not in sm90_rs_w4.SCALE_BYTES:
        return f"weights in one of {', '.join(sm90_rs_w4.SCALE_BYTES)}, got {weight}"
    if activations != "bf16":
        return f"activations 'bf16', got {activations!r}"
    return None


def refuse(weight: str, activations: str, layout: str) -> str | None:
    """Why the kernel does not take these weights, or None."""
    why = refuse_format(weight, activations)
    if why is None and layout != LAYOUT:
        return f"weights in layout {LAYOUT}, got {layout!r} (prepare them on the card)"
    return why


def choose_rows(mean: float) -> tuple[int, ...]:
    """Sizes of a tile where experts can expect `mean` tokens.

    From two standard deviations of Poisson's law below the mean to two and a half above, and a
    remainder where an expert needs several tiles; few sets, so that few kernels are compiled.
    Measured on one H200, 2026-11: perf/notes/hopper_gemm.md.
    """
    return next((rows for most, rows in ROWS if mean <= most), ROWS[-1][1])


def choose_tile(weight: str, rows: tuple[int, ...], blocks: float, device: Device) -> Tile:
    """The tile of those rows; `blocks`: blocks of 64 weight rows of all experts that are active.

    Few tokens: one block for each warpgroup, and as many warpgroups as divide the blocks evenly
    among the multiprocessors. A stage takes 0.2 us and 0.1 more for each warpgroup (H200, 2026-11:
    2.9, 3.8 and 4.2 TB/s with 2, 4 in two CTAs, and 4 in one). More tokens: accumulators of two
    blocks, so that a warpgroup reads its tokens for twice the rows.
    """
    if rows[-1] > MOST_ROWS_OF_FOUR:
        return _deepest(weight, Tile(rows, 2, 2, 1, 1))

    def microseconds(warpgroups: int) -> float:
        items = math.ceil(blocks / warpgroups)
        return math.ceil(items / max(device.sm_count, 1)) * (0.2 + 0.1 * warpgroups)

    best = min((4, 3, 2), key=microseconds)
    return _deepest(weight, Tile(rows, best, 1, 1, 1))


def _deepest(weight: str, tile: Tile) -> Tile:
    """The tile with all the stages that shared memory holds, 16 at most."""
    one = Config(weight, tile).smem_bytes
    each = Config(weight, replace(tile, stages=2)).smem_bytes - one
    return replace(tile, stages=min(16, 1 + (SMEM_BYTES - one) // each))


@dataclass(frozen=True)
class Config:
    """Everything the kernel is compiled for.

    Attributes:
        weight: "mxfp4" or "nvfp4".
        tile: how the work is cut.
        gather: row of x = slot // top_k of the sorted row, else the sorted row.
        scatter: row of out = slot, else the sorted row.
        out: "bf16", or "fp32".
        bias, factor: float32 [E, rows of w] is added; float32 [E] multiplies the sums.
        activation: "none", "swiglu", "geglu", "geglu_tanh" or "relu2".
        order: rows of gate and up in the bias.
        params: which of alpha, beta, limit are tensors [E]; the others are numbers.
        limit: the clamp exists.
        zero_tail: tiles of a negative expert write zeros.
        early: the tiles are older than the launch before, so weights need not wait for its end.
    """

    weight: str
    tile: Tile
    gather: bool = False
    scatter: bool = False
    out: str = "bf16"
    bias: bool = False
    factor: bool = False
    activation: str = "none"
    order: str = "plain"
    params: tuple[bool, bool, bool] = (False, False, False)
    limit: bool = False
    zero_tail: bool = False
    early: bool = False

    @property
    def gated(self) -> bool:
        """Two rows of w make an output."""
        return self.activation in ("swiglu", "geglu", "geglu_tanh")

    @property
    def unit(self) -> int:
        """Bytes of 64 rows and 64 columns of weights."""
        return sm90_rs_w4.unit_bytes(self.weight)

    @property
    def stage_bytes(self) -> tuple[int, int]:
        """Weights and activations of a stage."""
        w = self.tile.row_blocks * STAGE_UNITS * self.unit
        return w, self.tile.block_m * STAGE_COLUMNS * 2

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA: stages, barriers, offsets of rows, alignment."""
        return self.tile.stages * (sum(self.stage_bytes) + 16) + 8 * self.tile.block_m + 2048
