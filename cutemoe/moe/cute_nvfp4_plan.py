"""What the CuTe kernels of NVFP4 and MXFP4 layers run, and what they are compiled for.

Weights are codes of e2m1 with e4m3 scales for 16 and a multiplier for each expert (nvfp4), or with
e8m0 scales for 32 and nothing else (mxfp4). Activations are codes of the same format, or beside
nvfp4 weights numbers in bf16 or fp16, which need no block-scaled MMA and run alike on every card.

They are made for SM120 and SM121: no TMA, no cluster, at most SMEM_LIMIT bytes of shared memory.
On other cards from sm_80 on they run the same code with the block-scaled MMA emulated. NVFP4 is
faster there in the Triton kernels, so such a layer must be prepared with backend="cute_nvfp4";
one with 16-bit activations everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from cutemoe.gemm.weight import SM120
from cutemoe.moe.hybrid import Prefill, prefill_of, style_of
from cutemoe.moe.problem import Problem
from cutemoe.runtime.device import Device

# of a CTA on SM120 and SM121, less than on any other card that runs this but sm_86 and sm_89
SMEM_LIMIT = 101376
MAX_EXPERTS = 1024
# format of weights -> values that share a scale
GROUP = {"nvfp4": 16, "mxfp4": 32}
# format of weights -> of activations
TAKES = {"nvfp4": ("nvfp4", "bf16", "fp16"), "mxfp4": ("mxfp4",)}
# cards that have the block-scaled MMA
NATIVE = (120, 121)
MAX_INDEX = 2**31 - 1
# rows of w that a CTA multiplies
BLOCK_N = 128
# most CTAs that share the sums over the slots of all tokens, in one part of the columns
COMBINERS = 256


def has_pdl(arch: int) -> bool:
    """A kernel can start before the end of the one whose results it waits for."""
    return arch >= 90


@dataclass(frozen=True)
class Tile:
    """What one CTA computes at once.

    Attributes:
        block_m: routed rows.
        block_k: codes of a row that one stage of the pipeline holds, 128 or 256.
        stages: depth of the pipeline.
        warps_m, warps_n: warps along the rows and along BLOCK_N; each owns 32 or 64 rows of w.
        group: codes that share a scale, 16 (nvfp4) or 32 (mxfp4).
        numbers: rows are bf16 or fp16 numbers, not codes.
    """

    block_m: int
    block_k: int
    stages: int
    warps_m: int
    warps_n: int
    group: int = 16
    numbers: bool = False

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.warps_m * self.warps_n

    @property
    def words(self) -> int:
        """Scale words of a row in a stage."""
        return self.block_k // (4 * self.group)

    @property
    def row_bytes(self) -> int:
        """Codes, or numbers, of a routed row in a stage."""
        return 2 * self.block_k if self.numbers else self.block_k // 2

    @property
    def stage_bytes(self) -> int:
        """Both operands, and words of four scales for their codes."""
        scales = 4 * self.words
        row = self.row_bytes + (0 if self.numbers else scales)
        return self.block_m * row + BLOCK_N * (self.block_k // 2 + scales)

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA."""
        return self.stages * self.stage_bytes


TILES = {
    16: Tile(16, 256, 4, 1, 4),
    32: Tile(32, 256, 4, 2, 4),
    64: Tile(64, 256, 3, 2, 4),
    128: Tile(128, 128, 5, 4, 2),
}
# for 16-bit activations
MIXED_TILES = {
    16: Tile(16, 128, 4, 1, 4, numbers=True),
    32: Tile(32, 128, 4, 2, 4, numbers=True),
    64: Tile(64, 128, 3, 2, 4, numbers=True),
    128: Tile(128, 64, 4, 4, 2, numbers=True),
}


@dataclass(frozen=True)
class GemmConfig:
    """Everything FC1 or FC2 is compiled for.

    Attributes:
        arch: target, 10 * major + minor of the compute capability; chooses the MMA and conversions.
        tile: what a CTA computes.
        vector: bytes of codes copied at once: 16, or 8 where K is an odd multiple of 16.
        factor, bias: the weights have a multiplier for each expert; a bias exists.
        activation: "swiglu", "geglu", "geglu_tanh" or "relu2" (FC1), "none" (FC2).
        order: rows of gate and up, "gate_up", "up_gate" or "interleaved".
        alpha_e, beta_e, limit_e: the parameter has a value for each expert; limit: it exists.
        numbers: type of activations that are no codes, "bf16" or "fp16".
        wide: every row of such activations starts at a multiple of 16 bytes.
    """

    arch: int
    tile: Tile
    vector: int = 16
    factor: bool = True
    bias: bool = False
    activation: str = "none"
    order: str = "gate_up"
    alpha_e: bool = False
    beta_e: bool = False
    limit_e: bool = False
    limit: bool = False
    numbers: str = ""
    wide: bool = True

    @property
    def gated(self) -> bool:
        """Two rows of w make an output."""
        return self.activation in ("swiglu", "geglu", "geglu_tanh")

    @property
    def scaled(self) -> bool:
        """Activations have a multiplier for each expert, beside their block scales."""
        return self.tile.group == GROUP["nvfp4"] and not self.numbers

    @property
    def outputs(self) -> int:
        """Outputs of a CTA."""
        return BLOCK_N // 2 if self.gated else BLOCK_N


@dataclass(frozen=True)
class SortConfig:
    """Everything the sorting kernel is compiled for.

    Attributes:
        ids: "int32" or "int64".
        bins: local experts, rounded up to a power of two.
        flat: the ids lie one after the other.
        pdl: the target lets the next kernel start early.
    """

    ids: str
    bins: int
    flat: bool = True
    pdl: bool = True


@dataclass(frozen=True)
class RowsConfig:
    """Everything the kernels over rows of tokens, quantise and combine, are compiled for.

    Attributes:
        arch: as in GemmConfig.
        dtype: of x and out, "bf16" or "fp16".
        ids: "int32" or "int64".
        flat: the ids lie one after the other.
        wide: every row of x or out starts at a multiple of 16 bytes.
        group: values of x that share a scale.
    """

    arch: int
    dtype: str
    ids: str
    flat: bool = True
    wide: bool = True
    group: int = 16


@dataclass(frozen=True)
class FC2Config:
    """Everything FC2 with the weighted sum is compiled for; rows: of what it writes."""

    gemm: GemmConfig
    rows: RowsConfig


@dataclass(frozen=True)
class FusedConfig:
    """Everything the kernel of a whole layer is compiled for.

    Attributes:
        quantise: of x, where FC1 takes codes; else what it says of x alone.
        dynamic: tiles of the GEMMs are taken from a counter.
    """

    sort: SortConfig
    quantise: RowsConfig
    fc1: GemmConfig
    fc2: FC2Config
    dynamic: bool = False


@dataclass(frozen=True)
class Nvfp4Config:
    """The kernels of a layer, but for what only the tensors show (`cute_nvfp4_launch`).

    Attributes:
        style: see `cutemoe.moe.hybrid`.
        ctas: CTAs of a cooperative launch.
        prefill: what runs the layer in style "external".
    """

    sort: SortConfig
    rows: RowsConfig
    fc1: GemmConfig
    fc2: GemmConfig
    style: str = "pipeline"
    ctas: int = 1
    prefill: Prefill | None = None


def refuse_rounding(problem: Problem) -> str | None:
    """Why CuTe kernels, which keep sums and activation in float32, do not run this, or None."""
    if problem.rounding == "fused":
        return None
    return f"rounding 'fused', got {problem.rounding!r} (prepare with backend='triton')"


def refuse(problem: Problem, device: Device) -> str | None:
    """Why the CuTe kernels do not run this layer, or None."""
    p = problem
    if p.layout != SM120:
        return f"weights in layout {SM120!r}, got {p.layout!r} (prepare with backend='cute_nvfp4')"
    if p.activations not in TAKES.get(p.weight, ()):
        both = "weights and activations both nvfp4 or both mxfp4, or nvfp4 weights and 16 bits"
        return f"{both}, got {p.weight} and {p.activations}"
    if why := refuse_rounding(p):
        return why
    if p.experts > MAX_EXPERTS:
        return f"local experts <= {MAX_EXPERTS}, got {p.experts}"
    rows, n13 = p.tokens * p.top_k, p.intermediate * (2 if p.gated else 1)
    programs = most_tiles(p, 16) * (-(-max(n13, p.hidden) // BLOCK_N))
    if rows > MAX_INDEX or programs > MAX_INDEX:
        return f"tokens * top_k, and tiles of a GEMM, <= {MAX_INDEX}, got {rows} and {programs}"
    weights = max(n13, p.hidden) * max(p.hidden, p.intermediate)
    if weights // 2 > MAX_INDEX:
        return f"weights of an expert <= {MAX_INDEX} bytes, got {weights // 2}"
    return None


def configure(problem: Problem, device: Device) -> Nvfp4Config:
    """The configuration for a problem; the launch style, or who else runs it, by its rows."""
    prefill = prefill_of(problem, device)
    if prefill is not None:
        return replace(_configured(problem, device), style="external", prefill=prefill)
    return _configured(problem, device)


@lru_cache(maxsize=1024)
def _configured(problem: Problem, device: Device) -> Nvfp4Config:
    """The configuration for a problem; tiles by the rows that an expert can expect."""
    p = problem
    mean = p.tokens * p.top_k / p.experts
    block_m = next((m for m, most in ((16, 16), (32, 32), (64, 96)) if mean <= most), 128)
    arch, group = device.arch, GROUP[p.weight]
    numbers = "" if p.activations in GROUP else p.activations
    tile = replace((MIXED_TILES if numbers else TILES)[block_m], group=group)
    bins = max(32, 1 << (p.experts - 1).bit_length())
    return Nvfp4Config(
        SortConfig(p.ids, bins, pdl=has_pdl(arch)),
        RowsConfig(arch, p.dtype, p.ids, group=group),
        GemmConfig(
            arch,
            tile,
            vector=16 if p.hidden % 32 == 0 else 8,
            bias=p.has_b13,
            activation=p.activation,
            order=p.gate_up if p.gated else "gate_up",
            limit=p.has_limit,
            numbers=numbers,
        ),
        GemmConfig(
            arch,
            tile,
            vector=16 if p.intermediate % 32 == 0 else 8,
            bias=p.has_b2,
            numbers=numbers,
        ),
        style_of(p.tokens * p.top_k, arch in NATIVE),
        device.sm_count,
    )


def configure_pipeline(problem: Problem, device: Device) -> Nvfp4Config:
    """A launch for each stage."""
    return replace(_configured(problem, device), style="pipeline")


def configure_static(problem: Problem, device: Device) -> Nvfp4Config:
    """One cooperative launch, tiles dealt out."""
    return replace(_configured(problem, device), style="static")


def configure_dynamic(problem: Problem, device: Device) -> Nvfp4Config:
    """One cooperative launch, tiles from a counter."""
    return replace(_configured(problem, device), style="dynamic")


def refuse_emulated(problem: Problem, device: Device) -> str | None:
    """Why the emulation does not run beside the instruction, or None."""
    if device.arch not in NATIVE:
        return f"sm_120 or sm_121, whose MMA it emulates, got sm_{device.arch}"
    return refuse(problem, device)


def configure_emulated(problem: Problem, device: Device) -> Nvfp4Config:
    """The configuration that SM90 would run, on a card that has the instruction: to compare."""
    return _configured(problem, replace(device, arch=90))


def most_tiles(problem: Problem, block_m: int) -> int:
    """Most tiles of block_m rows that the routed rows can need, however they fall."""
    rows = problem.tokens * problem.top_k
    active = min(problem.experts, rows)
    return active + (rows - active) // block_m
