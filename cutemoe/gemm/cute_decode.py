"""4-bit words to A fragments of wgmma, in registers: what a recipe adds to the kernel.

A hook turns the codes of one row and 32 columns into the words of its fragments. Where it scales
the weights, bits are moved to exponent and mantissa, where they read as code * 2^-126 in bf16 and
2^-14 in fp16, and one product gives the value. Where it does not, what it makes is exact without
scales, and `scales` multiply the float32 sums of every group of columns. layouts/sm90_rs_w4.py has
the map of the bits. Instructions for the 8 codes of a word, scales of the word included:

| recipe | scales | instructions |
|---|---|---|
| mxfp4, nvfp4 x bf16, fp16 | on the weights | 13 or 14 |
| int4 x bf16, fp16 | on sums of a group | 11 |
| int4 x fp8 | on sums of a group | 7 |
| mxfp4 x fp8 | shifts within 128 columns on the weights, their exponent on sums | 11 |

Rejected for fp8: weights and activations widened to bf16. That is 13 instructions a word in place
of 7, twice the tensor core time, twice the bytes of tokens in shared memory. Rejected for int4: the
code + 8, three instructions and a correction by sums of tokens, which cancels where tokens have a
mean. Rejected for mxfp4: sums of 32 columns under their own scale, a wait and N / 32 multiplies a
weight and N tokens; and one exponent for all rows of an expert, which rounds.
"""

import cutlass.cute as cute
from cutlass import Float32, Uint32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import T, dsl_user_op

from cutemoe.layouts import sm80_w4, sm90_rs_w4

_SCALED = {"bf16": (sm80_w4.PLACE_BF16, "bf16x2"), "fp16": (sm80_w4.PLACE_FP16, "f16x2")}


def _scaled(compute: str, h: int, operands: tuple[int, int, int, int]) -> str:
    """The block of PTX that multiplies pair i by half h of multiplier operands[i]."""
    place, kind = _SCALED[compute]
    half = ("lo", "hi")[h]
    # $0..$3 pairs, $4 codes, $5.. multipliers: row g takes their low half, row g + 8 the high one
    lines = ["{\n", place]
    for n in sorted(set(operands)):
        lines.append(
            f".reg .b16 lo{n}, hi{n};\n.reg .b32 m{n};\nmov.b32 {{lo{n}, hi{n}}}, ${n};\n"
            f"mov.b32 m{n}, {{{half}{n}, {half}{n}}};\n"
        )
    lines += [f"mul.{kind} ${i}, ${i}, m{n};\n" for i, n in enumerate(operands)]
    return "".join([*lines, "}"])


# e4m3 below 2^-5 counts in steps of 2^-9: sign and n are n * 2^-9, and -1 - n needs one more
_INT4_FP8 = """{
.reg .b32 t;
and.b32 $0, $2, 0x87878787;
and.b32 t, $0, 0x80808080;
shr.u32 t, t, 7;
add.u32 $0, $0, t;
shf.r.wrap.b32 $1, $2, $2, 4;
and.b32 $1, $1, 0x87878787;
and.b32 t, $1, 0x80808080;
shr.u32 t, t, 7;
add.u32 $1, $1, t;
}"""
# magnitudes choose from a table of e4m3 in $3 and $4
_MXFP4_FP8 = """{
.reg .b32 s, t, u;
and.b32 s, $2, 0x77777777;
prmt.b32 t, $3, $4, s;
lop3.b32 $0, $2, 0x80808080, t, 0xEA;
shr.u32 s, s, 16;
prmt.b32 t, $3, $4, s;
shl.b32 u, $2, 4;
lop3.b32 $1, u, 0x80808080, t, 0xEA;
}"""


@dsl_user_op
def _run(ptx: str, operands, count, *, loc=None, ip=None):
    """`count` words from a block of PTX without side effects."""
    i32 = T.i32()
    struct = llvm.StructType.get_literal([i32] * count)  # pyright: ignore
    constraints = ",".join(["=&r"] * count + ["r"] * len(operands))
    values = [Uint32(x).ir_value(loc=loc, ip=ip) for x in operands]
    out = llvm.inline_asm(
        struct, values, ptx, constraints, has_side_effects=False, is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT, loc=loc, ip=ip,
    )  # fmt: skip
    return tuple(Uint32(llvm.extractvalue(i32, out, [i], loc=loc, ip=ip)) for i in range(count))


def opaque(x):
    """x, as a value that the compiler knows nothing of."""
    return _run("mov.b32 $0, $1;", (x,), 1)[0]


class Hook:
    """A recipe: its scale words, what it makes of codes, and what the sums still lack.

    Attributes:
        words: scale words of rows g and g + 8 a unit.
        power: multiplies the sums.
        group: columns whose sums have a scale of their own; 0 where the weights are scaled.
        step: columns decoded at once: two wgmma, or the one of a short group.
        ptx: for the codes of row g and of row g + 8.
    """

    words = 1
    power = 1.0
    group = 0
    step = 32
    ptx: tuple[str, str]

    def operands(self, words):
        """Scale words of a unit -> for each 32 columns, for rows g and g + 8, what `decode` takes
        besides codes."""
        return (((), ()), ((), ()))

    def scales(self, words):
        """Scale words of a unit -> for every group that begins in it Float32 of g and g + 8; none
        where the weights are scaled."""
        return ()

    def decode(self, word, operands, h):
        """Codes of 32 columns of row g + 8 h -> words of its fragments, in the order of k."""
        return _run(self.ptx[h], (word, *operands), 4)


class Mxfp4(Hook):
    """Groups of 32: one scale word a unit, for both halves of the columns."""

    def __init__(self, compute: str):
        self.ptx = (_scaled(compute, 0, (5, 5, 5, 5)), _scaled(compute, 1, (5, 5, 5, 5)))

    def operands(self, words):
        """A multiplier for each half of the columns."""
        w = words[0]
        turned = cute.arch.shf(w, w, 8, kind="l")
        pair = ((x & Uint32(0x7F807F80),) for x in (w, turned))
        return tuple((x, x) for x in pair)


class Nvfp4(Hook):
    """Groups of 16: a scale word for each 32 columns."""

    words = 2
    power = 128.0

    def __init__(self, compute: str):
        self.compute = compute
        self.ptx = (_scaled(compute, 0, (5, 5, 6, 6)), _scaled(compute, 1, (5, 5, 6, 6)))

    def operands(self, words):
        """Two multipliers for each half of the columns."""
        both = ((w, cute.arch.shf(w, w, 8, kind="l")) for w in words)
        if self.compute == "bf16":
            pair = (tuple((x & Uint32(0x0FF00FF0)) | Uint32(0x70007000) for x in p) for p in both)
        else:
            pair = (tuple(x & Uint32(0x7F807F80) for x in p) for p in both)
        return tuple((x, x) for x in pair)


class Int4(Hook):
    """Groups of 32, 64 or 128: bf16 scales of their sums."""

    def __init__(self, compute: str, group: int):
        self.group = group
        self.words = max(1, 64 // group)
        self.fp8 = compute == "fp8"
        if self.fp8:
            self.power = 512.0
            self.step = min(64, group)
            self.ptx = (_INT4_FP8, _INT4_FP8)
        else:
            codes = {"bf16": sm80_w4.INT4_BF16, "fp16": sm80_w4.INT4_FP16}[compute]
            self.ptx = ("{\n" + codes + "}", "{\n" + codes + "}")

    def scales(self, words):
        """bf16 in the halves of every word."""
        return [
            ((w << 16).bitcast(Float32), (w & Uint32(0xFFFF0000)).bitcast(Float32)) for w in words
        ]

    def decode(self, word, operands, h):
        """Codes as they are; in fp8 times 2^-9."""
        return _run(self.ptx[h], (word,), 2 if self.fp8 else 4)


class Mxfp4Fp8(Hook):
    """Groups of 32 shifted to a common exponent of 128 columns, which scales their sums."""

    group = sm90_rs_w4.SHARED
    step = 64
    ptx = (_MXFP4_FP8, _MXFP4_FP8)

    def operands(self, words):
        """Tables of e4m3 codes * 2^(d - 6): of 0, 1/2, 1, 3/2 and of 2, 3, 4, 6."""
        w = words[0]
        shifts = [[(w >> at) & Uint32(15) for at in (4 * j, 16 + 4 * j)] for j in range(2)]
        return tuple(
            tuple(
                (
                    d * Uint32(0x08080800) + Uint32(0x0C080000),
                    d * Uint32(0x08080808) + Uint32(0x1C181410),
                )
                for d in pair
            )
            for pair in shifts
        )

    def scales(self, words):
        """Bits of the exponent of float32 in bits 15..8 of the halves."""
        w = words[0]
        low, high = (w & Uint32(0xFF00)) << 15, (w >> 1) & Uint32(0x7F800000)
        return [(low.bitcast(Float32), high.bitcast(Float32))]

    def decode(self, word, operands, h):
        """Codes times 2^(d - 6)."""
        return _run(self.ptx[h], (word, *operands), 2)


def hook(weight: str, activations: str, group: int) -> Hook:
    """The hook of weights in this format, groups of that many columns, and these activations."""
    if weight == "int4":
        return Int4(activations, group)
    if weight == "mxfp4" and activations == "fp8":
        return Mxfp4Fp8()
    return {"mxfp4": Mxfp4, "nvfp4": Nvfp4}[weight](activations)
