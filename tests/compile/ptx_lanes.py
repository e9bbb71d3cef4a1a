"""A warp without a GPU for the texts of tests/compile/transplant.py: PTX in, registers by lanes.

Knows their instructions and no other, as the PTX ISA describes them; fp16 products and m16n8k16
are those of tests/dsl/lanes.py.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.dsl.lanes import LANES, Float32, Uint32, inline_ptx, m16n8k16

Registers = dict[str, np.ndarray]
BINARY = {
    "shr.u32": np.right_shift,
    "shl.b32": np.left_shift,
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "add.u32": np.add,
    "sub.u32": np.subtract,
}
COMPARE = {"setp.eq.u32": np.equal, "setp.gt.f32": np.greater, "setp.ge.f32": np.greater_equal}
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"


def fma(x: Any, y: Any, z: Any) -> np.ndarray:
    """x y + z of float32 with one rounding."""
    p, z = np.asarray(x, np.float64) * np.asarray(y, np.float64), np.asarray(z, np.float64)
    s = p + z
    # what the sum in double lost, into its last bit: rounded to odd, it can be rounded again
    other = s - p
    lost = (p - (s - other)) + (z - other)
    even = (s.view(np.int64) & 1 == 0) & np.isfinite(s) & np.isfinite(lost) & (lost != 0)
    s = np.where(even, np.nextafter(s, np.where(lost > 0, np.inf, -np.inf)), s)
    return s.astype(np.float32)


class Fused(Float32):
    """float32 as the DSL compiles it: a product that is only added is one FMA with the addition."""

    factors: tuple[Any, Any] | None = None

    def __mul__(self, o: Any) -> Any:
        product = super().__mul__(o)
        product.factors = self.v, Float32(o).v
        return product

    def __add__(self, o: Any) -> Any:
        if isinstance(o, Fused) and o.factors is not None:
            with np.errstate(all="ignore"):
                return Fused(fma(*o.factors, self.v))
        return super().__add__(o)


def execute(text: str, registers: Registers) -> None:
    """Runs the instructions of a text; registers are bits [32], predicates bool [32]."""
    body = re.sub(r"\.reg [^;]*;", "", text.strip().removeprefix("{").removesuffix("}"))
    with np.errstate(all="ignore"):
        for line in filter(None, (part.strip() for part in body.split(";"))):
            _step(line, registers)


def _step(line: str, r: Registers) -> None:
    name, _, rest = line.partition(" ")
    if name == MMA:
        sums, a, b, c = (g.split(", ") for g in re.findall(r"\{([^}]*)\}", rest))
        groups = [[_value(x, r) for x in g] for g in (a, b, c)]
        sums_after = m16n8k16([[], *groups[:2], _floats(groups[2])])
        for to, x in zip(sums, sums_after, strict=True):
            r[to] = x.astype(np.float32).view(np.uint32)
        return
    to, *words = [x.strip() for x in rest.split(",")]
    if name == "bar.warp.sync":
        return
    x = [_value(word, r) for word in words]
    if name in BINARY:
        r[to] = BINARY[name](x[0], x[1])
    elif name in COMPARE:
        r[to] = COMPARE[name](*(_floats(x) if name.endswith("f32") else x))
    elif name in ("mov.b32", "mov.u32", "cvt.u16.u32"):
        r[to] = x[0]
    elif name in ("selp.b32", "selp.u32"):
        r[to] = np.where(x[2], x[0], x[1])
    elif name == "shfl.sync.idx.b32":
        assert words[2:] == ["31", "-1"]
        r[to] = x[0][x[1]]
    elif name == "prmt.b32":
        assert words[1:] == ["0", "0x4400"]
        r[to] = (x[0] & 0xFF) * np.uint32(0x0101)
    elif name in ("mul.rn.f16x2", "cvt.rn.f16x2.e4m3x2"):
        r[to] = inline_ptx(name, [Uint32], [Uint32(v) for v in x]).v
    elif name == "mul.rn.f32":
        r[to] = np.multiply(*_floats(x)).view(np.uint32)
    elif name == "fma.rn.f32":
        r[to] = fma(*_floats(x)).view(np.uint32)
    else:
        raise NotImplementedError(line)


def _floats(words: list[np.ndarray]) -> list[np.ndarray]:
    return [w.view(np.float32) for w in words]


def _value(word: str, r: Registers) -> np.ndarray:
    """Bits of an operand: a register, the lane's number, or a constant."""
    if word == "%laneid":
        return LANES.copy()
    if word in r:
        return r[word]
    bits = int(word[2:], 16) if word.startswith("0f") else int(word, 0) & 0xFFFFFFFF
    return np.full(LANES.shape, bits, np.uint32)
