# pyright: reportAttributeAccessIssue=false
"""MMAs m16n8k64 of FP4 operands as policies: the instruction, or the same from 16-bit MMAs.

| format | instruction | scales | one word of a row |
|---|---|---|---|
| nvfp4 | kind::mxf4nvf4, scale_vec::4X | e4m3, one for 16 k | one step of 64 k |
| mxfp4 | kind::mxf4, scale_vec::2X | e8m0, one for 32 k | two steps: its halves |

Both take the same registers. Lane 4 g + t holds, of A [16, 64], B [64, 8] and their scales:

| register | holds |
|---|---|
| a0, a1, a2, a3 | 8 codes of row g, g + 8, g, g + 8 from k = 8 t (a0, a1) and 32 + 8 t (a2, a3) |
| b0, b1 | 8 codes of column g from k = 8 t and 32 + 8 t |
| sfa | scales of row g + 8 t, one byte a block of k; lanes t = 0 and 1 count |
| sfb | scales of column g; lane t = 0 counts |
| c0..c3 | sums (g, 2 t), (g, 2 t + 1), (g + 8, 2 t), (g + 8, 2 t + 1) |

The order of k is free as long as A and B agree. So one m16n8k16 takes the codes 0, 4, 1, 5 or
2, 6, 3, 7 of words 0 or 1 as its k, four make the instruction, and no code moves between lanes;
scales come by shuffles. A code times an e4m3 scale has 6 significant bits, from 2^-10 to 2688:
exact in fp16. Products are exact in float32; only the order of sums differs. e8m0 scales are beyond
fp16, so the 32 products under a pair of them are added up without, exactly, and then multiplied.

Where A is numbers in bf16 or fp16 (`MixedMma`), B is as in nvfp4, and every target runs the same
four m16n8k16. In place of codes lane 4 g + t holds the numbers of row g and g + 8 that have their
k; scaled codes are exact in bf16 as well.
"""

import cutlass.cute as cute
from cutlass import Float32, Uint32

from cutemoe.dsl.codec import Codec, mul_f16x2, ptx

# the e2m1 exponent bias is 1, that of fp16 15: codes placed into fp16 are 2^14 too small
_REBIAS = 0x74007400
# of bf16 it is 127: codes are 2^126 too small, e4m3 2^120
_REBIAS_BF16 = 0x7E807E80
_REBIAS_E4M3 = 0x7B807B80


def nvfp4_mma(arch: int):
    """The policy for a target, 10 * major + minor of its compute capability."""
    return NativeMma() if arch in (120, 121) else EmulatedMma(arch)


def mxfp4_mma(arch: int):
    """The policy for a target with mxfp4 scales."""
    return NativeMxfp4() if arch in (120, 121) else EmulatedMxfp4()


def mixed_mma(arch: int, dtype: str):
    """The policy for numbers A of that type, "bf16" or "fp16", and nvfp4 codes B."""
    return MixedMma(arch) if dtype == "fp16" else MixedBf16Mma(arch)


class NativeMma:
    """mma.sync kind::mxf4nvf4 of sm_120a and sm_121a."""

    native = True

    def a(self, words, scales):
        """Operand A of one step: its four words and the scale word."""
        return (*words, scales)

    def b(self, words, scales):
        """Operand B of one step: its two words and the scale word."""
        return (*words, scales)

    def mma(self, acc, a, b):
        """acc [4] += A B."""
        d = cute.arch.inline_ptx(
            "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col"
            ".f32.e2m1.e2m1.f32.ue4m3 {{$w0}, {$w1}, {$w2}, {$w3}}, "
            "{{$r0}, {$r1}, {$r2}, {$r3}}, {{$r5}, {$r6}}, {{$r8}, {$r9}, {$r10}, {$r11}}, "
            "{{$r4}}, {0, 0}, {{$r7}}, {0, 0};",
            write_only_types=[Float32] * 4,
            read_only_args=[*a, *b, *(acc[i] for i in range(4))],
        )
        for i in range(4):
            acc[i] = d[i]


class EmulatedMma:
    """Four mma.sync m16n8k16 of fp16 on scaled codes."""

    native = False
    # of the operands of m16n8k16
    dtype = "f16"

    def __init__(self, arch: int):
        self.codec = Codec(arch)

    def a(self, words, scales):
        """Operand A of one step: four times the registers of m16n8k16."""
        own, below = self._scales(scales, 0), self._scales(scales, 1)
        steps = []
        for half in range(2):
            top, bottom = words[2 * half], words[2 * half + 1]
            for q in (0, 2):
                steps.append(
                    [
                        scaled_codes(word >> (4 * (q + i)), scale[half])
                        for i in range(2)
                        for word, scale in ((top, own), (bottom, below))
                    ]
                )
        return steps

    def b(self, words, scales):
        """Operand B of one step: four times the registers of m16n8k16."""
        own = self._scales(scales, 0)
        return [
            [self.scaled(words[half] >> (4 * (q + i)), own[half]) for i in range(2)]
            for half in range(2)
            for q in (0, 2)
        ]

    def mma(self, acc, a, b):
        """acc [4] += A B."""
        for x, y in zip(a, b):
            d = cute.arch.inline_ptx(
                f"mma.sync.aligned.m16n8k16.row.col.f32.{self.dtype}.{self.dtype}.f32 "
                "{{$w0}, {$w1}, {$w2}, {$w3}}, {{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, "
                "{{$r6}, {$r7}, {$r8}, {$r9}};",
                write_only_types=[Float32] * 4,
                read_only_args=[*x, *y, *(acc[i] for i in range(4))],
            )
            for i in range(4):
                acc[i] = d[i]

    def scaled(self, word, scale):
        """Codes in bits 0..3 and 16..19 of a word, times a scale twice, exact."""
        return scaled_codes(word, scale)

    def pair(self, byte):
        """A scale twice in an operand's type, exact."""
        return self.codec.fp16_pair(byte)

    def _scales(self, word, t):
        """Pairs of the two scales that meet this lane's codes, from lane t of its quad."""
        lane = cute.arch.lane_idx()
        word = cute.arch.shuffle_sync(word, (lane & ~3) + t)
        # k = 8 t of a half is in its block t / 2
        word = word >> (Uint32(lane & 2) * Uint32(4))
        return [self.pair((word >> (16 * half)) & Uint32(0xFF)) for half in range(2)]


class MixedMma(EmulatedMma):
    """fp16 numbers A times nvfp4 codes B, on every target."""

    def a(self, numbers):
        """Operand A of one step: four times the registers of m16n8k16.

        numbers: the four words with k = 8 t .. 8 t + 7 of row g and of row g + 8, then those with
        k = 32 + 8 t ..
        """
        return [
            [
                halves(row[q // 2], row[2 + q // 2], i)
                for i in range(2)
                for row in numbers[at : at + 2]
            ]
            for at in (0, 2)
            for q in (0, 2)
        ]


class MixedBf16Mma(MixedMma):
    """bf16 numbers A times nvfp4 codes B, on every target."""

    dtype = "bf16"

    def scaled(self, word, scale):
        """Codes in bits 0..3 and 16..19 of a word, times a scale twice in bf16, exact."""
        return mul_bf16x2(mul_bf16x2(placed_codes(word, 6), Uint32(_REBIAS_BF16)), scale)

    def pair(self, byte):
        """Bits of e4m3 without sign in a Uint32 -> twice the same bf16, exact; 0x7f is NaN."""
        pair = mul_bf16x2(byte * Uint32(0x00100010), Uint32(_REBIAS_E4M3))
        return pair | (((byte + Uint32(1)) >> 7) * Uint32(0x7FC07FC0))


class NativeMxfp4:
    """mma.sync kind::mxf4 of sm_120a and sm_121a."""

    native = True

    def a(self, words, scales, half: int):
        """Operand A of one step: its four words, the scale word, and 0 or 1, which half of it."""
        return words, scales, half

    def b(self, words, scales, half: int):
        """Operand B of one step: its two words, the scale word, and which half of it."""
        return words, scales, half

    def mma(self, acc, a, b):
        """acc [4] += A B."""
        d = cute.arch.inline_ptx(
            "mma.sync.aligned.kind::mxf4.block_scale.scale_vec::2X.m16n8k64.row.col"
            ".f32.e2m1.e2m1.f32.ue8m0 {{$w0}, {$w1}, {$w2}, {$w3}}, "
            "{{$r0}, {$r1}, {$r2}, {$r3}}, {{$r5}, {$r6}}, {{$r8}, {$r9}, {$r10}, {$r11}}, "
            f"{{{{$r4}}}}, {{{2 * a[2]}, 0}}, {{{{$r7}}}}, {{{2 * b[2]}, 0}};",
            write_only_types=[Float32] * 4,
            read_only_args=[*a[0], a[1], *b[0], b[1], *(acc[i] for i in range(4))],
        )
        for i in range(4):
            acc[i] = d[i]


class EmulatedMxfp4:
    """Two mma.sync m16n8k16 of fp16 for 32 k, whose sums are then scaled.

    Exact for every pair of scales, as far as float32 goes.
    """

    native = False

    def a(self, words, scales, half: int):
        """Operand A of one step: registers of m16n8k16, and scales, for each 32 k."""
        quad = cute.arch.lane_idx() & ~3
        rows = [cute.arch.shuffle_sync(scales, quad + i) for i in range(2)]
        return [
            (
                [
                    [
                        values_of_codes(words[2 * block + r] >> (4 * (q + i)))
                        for i in range(2)
                        for r in range(2)
                    ]
                    for q in (0, 2)
                ],
                self._scales(rows, half, block),
            )
            for block in range(2)
        ]

    def b(self, words, scales, half: int):
        """Operand B of one step: registers of m16n8k16, and scales, for each 32 k."""
        # sums begin at zero here: without it ptxas computes many at once, in local memory
        cute.arch.sync_warp()
        t = cute.arch.lane_idx() & 3
        columns = [cute.arch.shuffle_sync(scales, 8 * t + 4 * i) for i in range(2)]
        return [
            (
                [
                    [values_of_codes(words[block] >> (4 * (q + i))) for i in range(2)]
                    for q in (0, 2)
                ],
                self._scales(columns, half, block),
            )
            for block in range(2)
        ]

    def _scales(self, words, half, block):
        """The scales of 32 k from scale words, in factors."""
        shift = 16 * half + 8 * block
        return [factors_of_e8m0((w >> shift) & Uint32(0xFF)) for w in words]

    def mma(self, acc, a, b):
        """acc [4] += A B."""
        for (left, sa), (right, sb) in zip(a, b):
            sums = [float32_zero()] * 4
            for x, y in zip(left, right):
                sums = cute.arch.inline_ptx(
                    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                    "{{$w0}, {$w1}, {$w2}, {$w3}}, {{$r0}, {$r1}, {$r2}, {$r3}}, {{$r4}, {$r5}}, "
                    "{{$r6}, {$r7}, {$r8}, {$r9}};",
                    write_only_types=[Float32] * 4,
                    read_only_args=[*x, *y, *sums],
                )
            for i in range(4):
                acc[i] = acc[i] + times_scales(sums[i], sa[i // 2], sb[i % 2])


def halves(low, high, i: int):
    """The low (i = 0) or high halves of two words, side by side."""
    return ptx(f"prmt.b32 {{$w0}}, {{$r0}}, {{$r1}}, {(0x5410, 0x7632)[i]};", Uint32, low, high)


def mul_bf16x2(x, y):
    """Two products of bf16 in a Uint32."""
    # sm_80 has no mul; what is added is -0, which keeps the sign of a zero
    text = (
        "{ .reg .b32 c, z; mov.b32 c, {$r1}; mov.b32 z, 0x80008000; "
        "fma.rn.bf16x2 {$w0}, {$r0}, c, z; }"
    )
    return ptx(text, Uint32, x, y)


def float32_zero():
    """0 in a register."""
    # DSL 4.7 takes no float constant as an operand
    return ptx("mov.b32 {$w0}, 0;", Float32)


def placed_codes(word, shift=9):
    """e2m1 codes in bits 0..3 and 16..19 of a word, as two fp16 2^14 times too small.

    With shift 6 as two bf16 2^126 times too small.
    """
    return ((word & Uint32(0x00070007)) << shift) | ((word & Uint32(0x00080008)) << 12)


def factors_of_e8m0(byte):
    """Two powers of two whose product is 2^(byte - 127); NaN of 255. Both in -64..64."""
    # 0x7fc00000 makes a quiet NaN of any bits
    broken = ((byte + Uint32(1)) >> 8) * Uint32(0x7FC00000)
    low = byte >> 1
    fields = (low + Uint32(64), byte - low + Uint32(63))
    return [((field << 23) | broken).bitcast(Float32) for field in fields]


def times_scales(x, a, b):
    """x times the two scales whose factors these are, in float32.

    Of one scale the lesser factor meets the greater of the other, so each product is in
    -127..127: what is infinite or zero on the way is so in the end.
    """
    return x * (a[0] * b[1]) * (a[1] * b[0])


def values_of_codes(word):
    """e2m1 codes in bits 0..3 and 16..19 of a word, twice in fp16."""
    return mul_f16x2(placed_codes(word), Uint32(_REBIAS))


def scaled_codes(word, scale):
    """e2m1 codes in bits 0..3 and 16..19 of a word, times a scale twice in fp16, exact."""
    return mul_f16x2(mul_f16x2(placed_codes(word), Uint32(_REBIAS)), scale)
