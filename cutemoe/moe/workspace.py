"""Scratch memory of a MoE layer: named parts of one buffer, placed by a pure function of sizes.

R = T * K routed rows. Sorted order means by local expert, then by slot number t * K + k; skipped
slots come last, at or beyond expert_start[E].

| part | dtype, shape | meaning |
|---|---|---|
| sorted_slots | int32 [R] | slot number of every sorted row |
| expert_start | int32 [E+1] | first sorted row of every expert; the last is the number of live rows |
| tiles | int32 [max_tiles, 3] | (expert, first sorted row, rows) of every tile of rows |
| tile_count | int32 [1] | how many of them are live |
| xq | bf16 | values of the quantised FC1 input without global scale: fp8 with row scales [T, H], else [R, H] in sorted order; e4m3 where the weights are in layout sm90_rs_w4_fp8 |
| mid | [R, I] | FC1 activation in sorted order: bf16 or fp16; float32 if it is quantised |
| mid | bf16 or fp16 [8 eights, I] | with such activations, weights in a layout of Hopper and I a multiple of 64: FC1 activation in tiles of layout sm90_tokens |
| x_tiles | bf16 or fp16 [8 eights, H] | likewise of H, and from `PACKED_ROWS` rows an expert on: x in such tiles, where y is later |
| midq | [R, I] | values of the quantised FC2 input, as xq |
| xq_scale, midq_scale | float32 [T], [R] | row scales of fp8 |
| xq, midq | uint8 [R, H/2], [R, I/2] | where the weights are in layout sm120_fp4: codes in sorted order |
| xq_scale, midq_scale | uint8 [R, 4 ceil(H/64)], .. [I]; mxfp4 [R, 4 ceil(H/128)], .. [I] | and their block scales; there is no mid |
| sync | int32 [4 + 2 ceil(H/128)] | there too: counters of CTAs that wait for one another |
| mid | bf16 or fp16 [R, I] | there with such activations: FC1 activation in sorted order; there is no xq and no midq |
| y | float32 [R, H] | FC2 output in slot order, with bias, without routing weight |
| y | float32 [slots R, columns] | there: the same for some columns at once, in turn in the slots (`y_parts`), where xq was if there was one |

With codes y takes the place of xq, which nobody reads after FC1. So a layer with E=256, H=7168,
I=2048 and 1024 routed rows (128 tokens of 8 slots) has 5.4 MB of scratch; a whole y alone would be
29.4 MB.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import torch

from cutemoe.errors import invalid
from cutemoe.gemm.weight import HOPPER, SM120, PackedWeight
from cutemoe.layouts import sm90_tokens

if TYPE_CHECKING:
    from cutemoe.moe.prepare import PreparedMoE
    from cutemoe.moe.problem import Problem

ALIGNMENT = 256
# a kernel may use tiles of this many rows or more
MIN_TILE_ROWS = 8
# a whole y of this many bytes is kept: in parts, few rows are too little work for a card
WHOLE_Y = 1 << 22
# rows of an expert from which on tiles of x are made for FC1, 8 at least
PACKED_ROWS = 64
# columns of y that FC2 computes at once
Y_BLOCK = 128


@dataclass(frozen=True)
class Part:
    """A tensor inside the buffer."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        """This part of a uint8 buffer, as a tensor."""
        size = prod(self.shape) * self.dtype.itemsize
        return buffer[self.offset : self.offset + size].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Layout:
    """Parts by name, and the bytes of the whole."""

    parts: dict[str, Part]
    nbytes: int

    def views(self, buffer: torch.Tensor) -> dict[str, torch.Tensor]:
        """Every part of a uint8 buffer by name."""
        return {name: part.view(buffer) for name, part in self.parts.items()}


def max_tiles(rows: int, experts: int) -> int:
    """Most tiles of MIN_TILE_ROWS or more rows that `rows` rows on `experts` experts can need."""
    return min(experts, rows) + rows // MIN_TILE_ROWS


def y_bytes(rows: int, hidden: int) -> int:
    """Bytes for y beside codes: all of it if small, else what xq has, at least two blocks."""
    codes = rows * (hidden // 2 + -(-hidden // 64) * 4)
    return min(4 * rows * hidden, max(WHOLE_Y, codes, 2 * 4 * Y_BLOCK * rows))


def y_parts(rows: int, hidden: int) -> tuple[int, int]:
    """(slots, columns) of y beside codes: one slot of all columns, or two of some blocks."""
    nbytes = y_bytes(rows, hidden)
    if nbytes == 4 * rows * hidden:
        return 1, hidden
    return 2, nbytes // (2 * 4 * Y_BLOCK * rows) * Y_BLOCK


def packs(activations: str, width: int, weights: str) -> bool:
    """A GEMM of these weights takes rows of that width as tiles of layout sm90_tokens."""
    whole = width % sm90_tokens.COLUMNS == 0
    return whole and activations in ("bf16", "fp16") and weights in HOPPER


def packs_x(activations: str, hidden: int, weights: str, rows: int, experts: int) -> bool:
    """So many rows that they are gathered into tiles before FC1."""
    return rows >= PACKED_ROWS * experts and packs(activations, hidden, weights)


def layout(
    tokens: int,
    top_k: int,
    experts: int,
    hidden: int,
    intermediate: int,
    activations: str,
    static_scale: bool,
    weights: str = "rows",
) -> Layout:
    """Where every part sits; `weights`: their layout, which decides how activations are kept.

    No part shrinks when tokens or top_k grow.
    """
    rows = tokens * top_k
    i32, f32, bf16 = torch.int32, torch.float32, torch.bfloat16
    wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "sorted_slots": ((rows,), i32),
        "expert_start": ((experts + 1,), i32),
        "tiles": ((max_tiles(rows, experts), 3), i32),
        "tile_count": ((1,), i32),
    }
    parted = weights == SM120
    codes = parted and activations in ("nvfp4", "mxfp4")
    if parted:
        wanted["sync"] = ((4 + 2 * -(-hidden // Y_BLOCK),), i32)
    if codes:
        for name, width in (("midq", intermediate), ("xq", hidden)):
            wanted[name] = ((rows, width // 2), torch.uint8)
            word = 128 if activations == "mxfp4" else 64
            wanted[f"{name}_scale"] = ((rows, -(-width // word) * 4), torch.uint8)
    elif activations in ("fp8", "nvfp4", "mxfp4"):
        kept = torch.float8_e4m3fn if weights in HOPPER else bf16
        wanted["xq"] = ((rows if static_scale else tokens, hidden), kept)
        wanted["mid"] = ((rows, intermediate), f32)
        wanted["midq"] = ((rows, intermediate), kept)
        if not static_scale:
            wanted["xq_scale"] = ((tokens,), f32)
            wanted["midq_scale"] = ((rows,), f32)
    else:
        dtype = torch.bfloat16 if activations == "bf16" else torch.float16
        packed = packs(activations, intermediate, weights)
        most = 8 * sm90_tokens.eights(rows, experts) if packed else rows
        wanted["mid"] = ((most, intermediate), dtype)
    if not parted:
        wanted["y"] = ((rows, hidden), f32)
    parts, offset = {}, 0
    for name, (shape, dtype) in wanted.items():
        parts[name] = Part(offset, shape, dtype)
        offset += _aligned(prod(shape) * dtype.itemsize)
    if packs_x(activations, hidden, weights, rows, experts):
        # at most 2 * rows of 2 bytes a value, from 8 rows an expert on
        shape = (8 * sm90_tokens.eights(rows, experts), hidden)
        parts["x_tiles"] = Part(parts["y"].offset, shape, parts["mid"].dtype)
    if parted:
        slots, columns = y_parts(rows, hidden)
        start = parts["xq"].offset if codes else offset
        y = parts["y"] = Part(start, (slots * rows, columns), f32)
        offset = max(offset, y.offset + _aligned(y_bytes(rows, hidden)))
    return Layout(parts, offset)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def layout_of(problem: Problem) -> Layout:
    """Where every part sits for a call."""
    p = problem
    sizes = (p.tokens, p.top_k, p.experts, p.hidden, p.intermediate)
    rest = (p.activations, p.static_scale, p.layout)
    # torch.compile traces with sizes that cannot be hashed
    plain = all(type(n) is int for n in sizes)
    return _remembered(WHOLE_Y, *sizes, *rest) if plain else layout(*sizes, *rest)


@lru_cache(maxsize=1024)
def _remembered(whole_y: int, *given: Any) -> Layout:
    """`layout`, which depends on WHOLE_Y too."""
    return layout(*given)


@dataclass(frozen=True, eq=False)
class Workspace:
    """Scratch memory for `fused_moe`: with it and `out`, a call allocates nothing.

    Args:
        buffer: uint8, one dimension, contiguous; its first element 256-byte aligned in its storage.

    Raises:
        InvalidCall: another kind of tensor.
    """

    buffer: torch.Tensor

    def __post_init__(self) -> None:
        b = self.buffer
        if not isinstance(b, torch.Tensor) or b.dtype != torch.uint8 or b.ndim != 1:
            raise invalid("buffer", "a uint8 tensor of rank 1", type(b).__name__)
        if not b.is_contiguous() or b.storage_offset() % ALIGNMENT:
            raise invalid("buffer", f"contiguous bytes, {ALIGNMENT}-byte aligned", b.stride())

    @staticmethod
    def for_moe(moe: PreparedMoE, max_tokens: int, top_k: int) -> Workspace:
        """Scratch for calls of this layer with at most max_tokens tokens of at most top_k slots.

        Raises:
            InvalidCall: moe is no PreparedMoE, or a size is not a positive integer.
        """
        # by its parts: the class is in a module that imports this one's users
        if not isinstance(getattr(moe, "w13", None), PackedWeight):
            raise invalid("moe", "a PreparedMoE", type(moe).__name__, "cutemoe.prepare_moe")
        for name, size in (("max_tokens", max_tokens), ("top_k", top_k)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise invalid(name, "a positive integer", repr(size))
        plan = layout(
            max_tokens,
            top_k,
            moe.experts,
            moe.hidden,
            moe.intermediate,
            moe.activations,
            moe.input_scale1 is not None,
            moe.w13.layout,
        )
        return Workspace(torch.empty(plan.nbytes, dtype=torch.uint8, device=moe.device))

    @property
    def nbytes(self) -> int:
        """Bytes of the buffer."""
        return self.buffer.numel()

    @property
    def device(self) -> torch.device:
        """Device of the buffer."""
        return self.buffer.device
