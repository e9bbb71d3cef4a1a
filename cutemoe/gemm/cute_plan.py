"""What the Hopper kernel of the mixed-input GEMM is compiled for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from cutemoe.layouts import sm90_rs_w4
from cutemoe.runtime.backend import triton_unavailable
from cutemoe.runtime.compile import cute_unavailable
from cutemoe.runtime.device import Device

# by the activations
LAYOUTS = {compute: name for name, compute in sm90_rs_w4.COMPUTE.items()}
# shared memory that a CTA of sm_90 may have
SMEM_BYTES = 232448
# most tokens that an expert can expect -> sizes of a tile
ROWS = (
    (8.5, (8, 16)),
    (12.0, (8, 16, 24)),
    (25.0, (24, 32, 40)),
    (33.0, (24, 32, 40, 48)),
    (52.0, (40, 56, 72)),
    (72.0, (56, 72, 88, 96)),
    (100.0, (80, 96, 112, 128)),
    (140.0, (120, 136, 152)),
    (math.inf, (32, 64, 96, 128)),
)
# where sums of groups have registers of their own: fp8, then int4 with 16-bit activations
ROWS_FP8 = (
    (8.5, (8, 16)),
    (25.0, (16, 24, 32, 40)),
    *ROWS[3:6],
    (100.0, (80, 96, 112)),
    (math.inf, (32, 64, 96, 112)),
)
ROWS_INT4 = (*ROWS_FP8[:2], *ROWS[3:5], (math.inf, (32, 64, 96)))
# most tokens whose sums leave four warpgroups registers for the rest, and those of two blocks
MOST_ROWS_OF_FOUR = 48
MOST_ROWS_OF_FOUR_PAIRS = 40
# least registers beside the sums that four sets of fragments fit into
FOUR_SETS = 88
# of a stage of few tokens with (warpgroups, blocks of each), relatively; H200, 2026-11
STAGE_US = {(4, 2): 1.15, (3, 2): 0.89, (4, 1): 0.6, (3, 1): 0.5, (2, 1): 0.4}
# columns of a pipeline stage: two units of the weight layout
STAGE_UNITS = 2
STAGE_COLUMNS = STAGE_UNITS * sm90_rs_w4.COLUMNS
# most routed rows that every CTA sorts for itself
MOST_SORTED = 64


@dataclass(frozen=True)
class Recipe:
    """Operands: format of the weights, values per scale, and format of the activations."""

    weight: str
    group: int
    activations: str = "bf16"

    @property
    def partial(self) -> bool:
        """Scales multiply the sums of a group, which need registers of their own."""
        return self.weight == "int4" or self.activations == "fp8"

    @property
    def unit(self) -> int:
        """Bytes of 64 rows and 64 columns of weights."""
        return sm90_rs_w4.unit_bytes(self.weight, self.group)

    @property
    def width(self) -> int:
        """Bytes of a value of the activations."""
        return 1 if self.activations == "fp8" else 2


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
        # 32 leave four warpgroups 112, without which sums of groups do not fit
        many = self.warpgroups == 4 or (self.ctas == 2 and self.warpgroups == 2)
        load = 32 if many else 40
        return load, min(240, (pool - load) // self.warpgroups // 8 * 8)

    @property
    def sets(self) -> int:
        """Sets of A fragments of a thread of math, where scales multiply no sums.

        With four, wgmma of one step or two may run while the next is decoded, and codes are loaded
        a stage ahead. H200, 2026-11-30, us of a layer with two and with four: headline shape at 4
        tokens 86.6 and 83.8; gpt-oss-120b at 1024, three warpgroups of two blocks, 669 to 689 and
        645 to 670; at 4096, two of two and 152 tokens, 1528 and 1573.
        """
        sums = self.blocks * self.block_m // 2
        few = self.block_m <= MOST_ROWS_OF_FOUR
        return 4 if few and self.registers[1] - sums >= FOUR_SETS else 2

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
    known = sm90_rs_w4.WEIGHTS.get(activations)
    if known is None:
        return f"activations in one of {', '.join(sm90_rs_w4.WEIGHTS)}, got {activations!r}"
    if weight not in known:
        return f"with {activations} weights in one of {', '.join(known)}, got {weight}"
    return None


def refuse(weight: str, activations: str, layout: str) -> str | None:
    """Why the kernel does not take these weights, or None."""
    why = refuse_format(weight, activations)
    if why is None and layout != (want := LAYOUTS[activations]):
        return f"weights in layout {want}, got {layout!r} (prepare them on the card)"
    return why


def choose_rows(mean: float, recipe: Recipe) -> tuple[int, ...]:
    """Sizes of a tile where experts can expect `mean` tokens.

    From two standard deviations of Poisson's law below the mean to two and a half above, and a
    remainder where an expert needs several tiles; few sets, so that few kernels are compiled.
    Measured on one H200, 2026-11: perf/notes/hopper_gemm.md.
    """
    table = tables(recipe)
    rows = next((rows for most, rows in table if mean <= most), table[-1][1])
    return SPILLED.get((recipe, rows), rows)


# what ptxas does not fit into registers, and what it does
SPILLED: dict[tuple[Recipe, tuple[int, ...]], tuple[int, ...]] = {
    (Recipe("int4", 64, "fp8"), (16, 24, 32, 40)): (24, 32, 40, 48),
    # with a bias; a second scale word a unit
    (Recipe("nvfp4", 16), (120, 136, 152)): (112, 120, 128),
    (Recipe("nvfp4", 16, "fp16"), (120, 136, 152)): (112, 120, 128),
}

# int4 x fp8 that has 8 bytes of local memory with the codes of a stage loaded first
SPILLED_CODES = ((24, 32, 40, 48), (32, 64, 96, 112))


def tables(recipe: Recipe) -> tuple[tuple[float, tuple[int, ...]], ...]:
    """Most tokens that an expert can expect, and sizes of a tile, in ascending order."""
    if not recipe.partial:
        return ROWS
    return ROWS_FP8 if recipe.activations == "fp8" else ROWS_INT4


def near_rows(recipe: Recipe, rows: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Sizes of tiles beside these in the table of a recipe, smaller first."""
    known = [SPILLED.get((recipe, r), r) for _, r in tables(recipe)]
    at = known.index(rows) if rows in known else 0
    return [known[i] for i in (at - 1, at + 1, at + 2) if 0 <= i < len(known)]


def other_tiles(recipe: Recipe, tile: Tile) -> list[Tile]:
    """Tiles of the same rows that cut the weights in another way."""
    few = ((4, 1, 1), (3, 1, 1), (2, 1, 1), (2, 1, 2))
    if not recipe.partial:
        pairs = ((4, 2, 1), (3, 2, 1))
        few = (*(pairs if tile.block_m <= MOST_ROWS_OF_FOUR_PAIRS else pairs[1:]), *few)
    many = ((2, 2, 1), (3, 1, 1), (2, 1, 1), (2, 1, 2))
    shapes = many if tile.block_m > MOST_ROWS_OF_FOUR else few
    return [deepest(recipe, Tile(tile.rows, wg, blocks, 1, ctas)) for wg, blocks, ctas in shapes]


def choose_tile(
    recipe: Recipe, rows: tuple[int, ...], experts: float, blocks: int, device: Device
) -> Tile:
    """The tile of those rows; experts that are active, each of so many blocks of 64 weight rows.

    As many warpgroups, and blocks for each, as divide the blocks evenly among the multiprocessors.
    A warpgroup of two blocks needs fewer instructions, and its tokens are copied for twice the
    rows; with scales on sums of groups that takes too many registers. Many tokens: two blocks, as
    the copies of the tokens are what binds.
    """
    if rows[-1] > 72 and recipe.partial and recipe.width == 2:
        return deepest(recipe, Tile(rows, 3, 1, 1, 1))
    if rows[-1] > MOST_ROWS_OF_FOUR:
        return deepest(recipe, Tile(rows, 2, 2, 1, 1))

    def microseconds(shape: tuple[int, int]) -> float:
        items = math.ceil(experts * math.ceil(blocks / (shape[0] * shape[1])))
        return math.ceil(items / max(device.sm_count, 1)) * STAGE_US[shape]

    fit = [
        (warpgroups, each)
        for warpgroups, each in STAGE_US
        if each == 1
        or (not recipe.partial and (warpgroups < 4 or rows[-1] <= MOST_ROWS_OF_FOUR_PAIRS))
    ]
    best = min(fit, key=microseconds)
    return deepest(recipe, Tile(rows, *best, 1, 1))


def deepest(recipe: Recipe, tile: Tile) -> Tile:
    """The tile with all the stages that shared memory holds, 16 at most."""
    one = Config(recipe, tile).smem_bytes
    each = Config(recipe, replace(tile, stages=2)).smem_bytes - one
    # every CTA costs 1 KB more than it asks for
    most = (SMEM_BYTES + 1024) // tile.ctas - 1024
    return replace(tile, stages=min(16, 1 + (most - one) // each))


@dataclass(frozen=True)
class Config:
    """Everything the kernel is compiled for.

    Attributes:
        recipe: formats of both operands.
        tile: how the work is cut.
        gather: row of x = slot // top_k of the sorted row, else the sorted row.
        scatter: row of out = slot, else the sorted row.
        out: "bf16", "fp16" or "fp32".
        bias, factor: float32 [E, rows of w] is added; float32 [E] multiplies the sums.
        x_scale: "none", or float32 multiplies the sums: one a "row" of x, or one an "expert".
        activation: "none", "swiglu", "geglu", "geglu_tanh" or "relu2".
        order: rows of gate and up in the bias.
        params: which of alpha, beta, limit are tensors [E]; the others are numbers.
        limit: the clamp exists.
        packed_x, packed_out: rows of x or of out are tiles of layout sm90_tokens.
        ids: "", or the dtype of expert ids, of at most MOST_SORTED slots, that the kernel sorts.
        zero_tail: tiles of a negative expert write zeros.
        early: tiles or ids are older than the launch before, so weights need not wait for its end.
    """

    recipe: Recipe
    tile: Tile
    gather: bool = False
    scatter: bool = False
    out: str = "bf16"
    bias: bool = False
    factor: bool = False
    x_scale: str = "none"
    activation: str = "none"
    order: str = "plain"
    params: tuple[bool, bool, bool] = (False, False, False)
    limit: bool = False
    packed_x: bool = False
    packed_out: bool = False
    ids: str = ""
    zero_tail: bool = False
    early: bool = False

    @property
    def gated(self) -> bool:
        """Two rows of w make an output."""
        return self.activation in ("swiglu", "geglu", "geglu_tanh")

    @property
    def stage_bytes(self) -> tuple[int, int]:
        """Weights and activations of a stage."""
        w = self.tile.row_blocks * STAGE_UNITS * self.recipe.unit
        return w, self.tile.block_m * STAGE_COLUMNS * self.recipe.width

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA: stages, barriers, offsets of rows, the sort, alignment."""
        return self.tile.stages * (sum(self.stage_bytes) + 16) + 8 * self.tile.block_m + 2048
