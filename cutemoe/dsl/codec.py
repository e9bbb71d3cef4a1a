# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false
"""Codes of nvfp4 and mxfp4 in registers: float32 -> block scales and e2m1 codes, e4m3 -> fp16.

The order of operations is that of cutemoe.formats, IEEE float32 only, so every bit equals
what torch computes. Conversions are instructions where the target has them and bit patterns where
not; both give the same codes.

| target | e4m3 both ways | float32 -> e2m1 |
|---|---|---|
| sm_80 | bits | bits |
| sm_89, sm_90 | cvt | bits |
| sm_120a, sm_121a | cvt | cvt |
"""

import cutlass.cute as cute
from cutlass import Float32, Uint32, const_expr

SCALE_MAX = 448.0
E4M3_NAN = 0x7F
E8M0_NAN = 0xFF
INFINITY_BITS = 0x7F800000


def ptx(text, result, *args):
    """One value from a short sequence of PTX."""
    return cute.arch.inline_ptx(text, write_only_types=[result], read_only_args=list(args))


class Codec:
    """The conversions for one target, 10 * major + minor of its compute capability."""

    def __init__(self, arch: int):
        self.e4m3 = arch >= 89
        self.e2m1 = arch in (100, 103, 120, 121)

    @cute.jit
    def block_scale(self, amax_bits, g):
        """Scale byte and multiplier r of a block under g, from the bits of its greatest |x|.

        As bits NaN orders above infinity above all numbers, so the greatest tells of a broken
        block, which gets the scale NaN. r is 0 where the codes are: under NaN and under zero.
        """
        s = amax_bits.bitcast(Float32) * (g * Float32(1.0 / 6.0))
        s = s if s < SCALE_MAX else Float32(SCALE_MAX)
        byte = self.encode_e4m3(s)
        byte = byte if amax_bits < Uint32(INFINITY_BITS) else Uint32(E4M3_NAN)
        live = byte > Uint32(0) and byte < Uint32(E4M3_NAN)
        r = divide(g, self.decode_e4m3(byte if live else Uint32(0x38)))
        return byte, (r if live else Float32(0.0))

    def scale_of(self, group, amax_bits, g):
        """Scale byte and multiplier r of a block of 16 (nvfp4) or, without g, of 32 (mxfp4)."""
        return self.block_scale(amax_bits, g) if group == 16 else self.block_power(amax_bits)

    @cute.jit
    def block_power(self, amax_bits):
        """e8m0 scale byte and multiplier r of a block, from the bits of its greatest |x|.

        2^(floor(log2 amax) - 2); NaN, and then r is 0, under a NaN or an infinity.
        """
        field = amax_bits >> 23
        byte = field - Uint32(2) if field > Uint32(2) else Uint32(0)
        byte = byte if amax_bits < Uint32(INFINITY_BITS) else Uint32(E8M0_NAN)
        # a finite block has at most 252, so r is a normal number
        r = ((Uint32(254) - byte) << 23).bitcast(Float32)
        return byte, (r if byte < Uint32(E8M0_NAN) else Float32(0.0))

    @cute.jit
    def byte_of_codes(self, low, high, r):
        """The codes of low * r and high * r, the first in the low nibble; 0 where r is."""
        pair = self.encode_e2m1_pair(low * r, high * r)
        return pair if r > 0.0 else Uint32(0)

    @cute.jit
    def encode_e4m3(self, x):
        """float32 in 0..448 -> bits of e4m3 in a Uint32, nearest even."""
        if const_expr(self.e4m3):
            byte = ptx(
                "{ .reg .b16 h; cvt.rn.satfinite.e4m3x2.f32 h, 0f00000000, {$r0}; "
                "cvt.u32.u16 {$w0}, h; }",
                Uint32,
                x,
            )
        else:
            bits = x.bitcast(Uint32)
            odd = (bits >> 20) & Uint32(1)
            normal = ((bits + Uint32(0x7FFFF) + odd) >> 20) - Uint32(120 << 3)
            # below 2^-6 codes are multiples of 2^-9: rounded where a float32 has unit steps
            small = (x * Float32(512.0) + Float32(12582912.0)).bitcast(Uint32) & Uint32(0xF)
            byte = small if x < 0.015625 else normal
        return byte

    @cute.jit
    def decode_e4m3(self, byte):
        """Bits of a positive finite e4m3 in a Uint32 -> float32, exact."""
        normal = ((byte << 20) + Uint32(120 << 23)).bitcast(Float32)
        return Float32(byte) * Float32(0.001953125) if byte < Uint32(8) else normal

    def fp16_pair(self, byte):
        """Bits of e4m3 without sign in a Uint32 -> twice the same fp16, exact; 0x7f is NaN."""
        if self.e4m3:
            return ptx(
                "{ .reg .b16 h; .reg .b32 p; prmt.b32 p, {$r0}, 0, 0x4400; cvt.u16.u32 h, p; "
                "cvt.rn.f16x2.e4m3x2 {$w0}, h; }",
                Uint32,
                byte,
            )
        # moved by 7 bits it is an fp16 2^8 too small, subnormals included
        pair = mul_f16x2(byte * Uint32(0x800080), Uint32(0x5C005C00))
        return pair | (((byte + Uint32(1)) >> 7) * Uint32(0x7E007E00))

    @cute.jit
    def encode_e2m1_pair(self, low, high):
        """Two float32, no NaN -> their e2m1 codes in a Uint32, the first in the low nibble."""
        if const_expr(self.e2m1):
            byte = ptx(
                "{ .reg .b8 c; cvt.rn.satfinite.e2m1x2.f32 c, {$r1}, {$r0}; cvt.u32.u8 {$w0}, c; }",
                Uint32,
                low,
                high,
            )
        else:
            byte = encode_e2m1(low) | (encode_e2m1(high) << 4)
        return byte


@cute.jit
def encode_e2m1(x):
    """float32, no NaN -> e2m1 code 0..15 in a Uint32, nearest even, saturating at 6."""
    bits = x.bitcast(Uint32)
    sign = (bits >> 28) & Uint32(8)
    a = (bits & Uint32(0x7FFFFFFF)).bitcast(Float32)
    a = a if a < 6.0 else Float32(6.0)
    # from 1 on a code is the exponent and the upper mantissa bit of a float32
    m = a.bitcast(Uint32)
    normal = ((m + Uint32(0x1FFFFF) + ((m >> 22) & Uint32(1))) >> 22) - Uint32(252)
    # 0, 1/2 and 1: rounded where a float32 has unit steps
    small = (a * Float32(2.0) + Float32(12582912.0)).bitcast(Uint32) & Uint32(3)
    return sign | (small if a < 1.0 else normal)


def divide(x, y):
    """x / y rounded to nearest."""
    return ptx("div.rn.f32 {$w0}, {$r0}, {$r1};", Float32, x, y)


def reciprocal(x):
    """1 / x rounded to nearest."""
    # DSL 4.7 takes no float constant as an operand
    return ptx("div.rn.f32 {$w0}, 0f3F800000, {$r0};", Float32, x)


def mul_f16x2(x, y):
    """Two products of fp16 in a Uint32."""
    # the instruction takes no immediate
    text = "{ .reg .b32 c; mov.b32 c, {$r1}; mul.rn.f16x2 {$w0}, {$r0}, c; }"
    return ptx(text, Uint32, x, y)


def absolute_bits(x):
    """Bits of |x| of a float32."""
    return x.bitcast(Uint32) & Uint32(0x7FFFFFFF)
