"""4-bit words to A fragments of wgmma in bf16, in registers: what a format adds to the kernel.

A hook turns the codes of one row and 32 columns, and the multipliers of rows g and g + 8, into four
pairs. Bits are moved to exponent and mantissa, where they read as code * 2^-126; one product gives
the value, its scale included. layouts/sm90_rs_w4.py has the map of the bits.
"""

import cutlass.cute as cute
from cutlass import Uint32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from cutemoe.layouts import sm80_w4


def _scaled(h: int, operands: tuple[int, int, int, int]) -> str:
    """The block of PTX that multiplies pair i by half h of multiplier operands[i]."""
    half = ("lo", "hi")[h]
    # $0..$3 pairs, $4 codes, $5.. multipliers: row g takes their low half, row g + 8 the high one
    lines = ["{\n", sm80_w4.PLACE_BF16]
    for n in sorted(set(operands)):
        lines.append(
            f".reg .b16 lo{n}, hi{n};\n.reg .b32 m{n};\nmov.b32 {{lo{n}, hi{n}}}, ${n};\n"
            f"mov.b32 m{n}, {{{half}{n}, {half}{n}}};\n"
        )
    lines += [f"mul.bf16x2 ${i}, ${i}, m{n};\n" for i, n in enumerate(operands)]
    return "".join([*lines, "}"])


@dsl_user_op
def _run(ptx: str, operands, *, loc=None, ip=None):
    """Four words from a block of PTX without side effects."""
    i32 = T.i32()
    struct = llvm.StructType.get_literal([i32] * 4)  # pyright: ignore
    constraints = ",".join(["=&r"] * 4 + ["r"] * len(operands))
    values = [Uint32(x).ir_value(loc=loc, ip=ip) for x in operands]
    out = llvm.inline_asm(
        struct, values, ptx, constraints, has_side_effects=False, is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip
    return tuple(Uint32(llvm.extractvalue(i32, out, [i], loc=loc, ip=ip)) for i in range(4))


class Hook:
    """A format: its scale words, and what a decoded row still lacks.

    `multipliers` turns the scale words of a unit into what `pairs` takes, for each 32 columns.

    Attributes:
        words: scale words of rows g and g + 8 a unit.
        power: multiplies the sums.
    """

    words: int
    power: float
    # by row g or g + 8: a block of PTX
    ptx: tuple[str, str]

    @classmethod
    def pairs(cls, word, scale, h):
        """Codes of 32 columns of row g + 8 h -> bf16 values of pairs 0..3."""
        return _run(cls.ptx[h], (word, *scale))


class Mxfp4(Hook):
    """Groups of 32: one scale word a unit, for both halves of the columns."""

    words = 1
    power = 1.0
    ptx = (_scaled(0, (5, 5, 5, 5)), _scaled(1, (5, 5, 5, 5)))

    @staticmethod
    def multipliers(words):
        """Scale words of a unit -> for each 32 columns what `pairs` takes."""
        w = words[0]
        turned = cute.arch.shf(w, w, 8, kind="l")
        return tuple((x & Uint32(0x7F807F80),) for x in (w, turned))


class Nvfp4(Hook):
    """Groups of 16: a scale word for each 32 columns."""

    words = 2
    power = 128.0
    ptx = (_scaled(0, (5, 5, 6, 6)), _scaled(1, (5, 5, 6, 6)))

    @staticmethod
    def multipliers(words):
        """Scale words of a unit -> for each 32 columns what `pairs` takes."""
        pairs = ((w, cute.arch.shf(w, w, 8, kind="l")) for w in words)
        return tuple(
            tuple((x & Uint32(0x0FF00FF0)) | Uint32(0x70007000) for x in pair) for pair in pairs
        )


HOOKS = {"mxfp4": Mxfp4, "nvfp4": Nvfp4}
