"""4-bit codes to 16-bit floats, exactly, in registers: device functions that touch no memory.

Layout `sm80_w4` (cutemoe/layouts/sm80_w4.py says where the bits sit and why): one block of PTX
turns a 32-bit word, two neighbouring half-words, into its four pairs of codes and multiplies each
pair by its scale: 13 instructions for 8 codes of e2m1 in bf16. The interpreter runs no PTX, so with
`portable` the same words go through integer Triton; both must agree bit for bit.

Layout `rows`: bytes as in the checkpoint, low nibble first, decoded nibble by nibble.
"""

import triton
import triton.language as tl

from cutemoe.layouts import sm80_w4

# e2m1 bits in place read as code * 2^-126; -0 is the addend of a product that keeps its sign
_E2M1_BF16 = tl.constexpr(
    "{\n"
    + sm80_w4.PLACE_BF16
    + """mov.b32 t, 0x80008000;
fma.rn.bf16x2 $0, $0, $5, t;
fma.rn.bf16x2 $1, $1, $6, t;
fma.rn.bf16x2 $2, $2, $7, t;
fma.rn.bf16x2 $3, $3, $8, t;
}"""
)
_E2M1_FP16 = tl.constexpr("{\n" + sm80_w4.PLACE_FP16 + "}")
_E2M1_FP16_SCALED = tl.constexpr(
    "{\n"
    + sm80_w4.PLACE_FP16
    + """mul.f16x2 $0, $0, $5;
mul.f16x2 $1, $1, $6;
mul.f16x2 $2, $2, $7;
mul.f16x2 $3, $3, $8;
}"""
)
_INT4_BF16 = tl.constexpr("{\n" + sm80_w4.INT4_BF16 + "}")
_INT4_FP16 = tl.constexpr("{\n" + sm80_w4.INT4_FP16 + "}")


@triton.jit
def word_scales(w, WHICH: tl.constexpr, NVFP4: tl.constexpr, FP16: tl.constexpr):
    """Bits of the multiplier of code WHICH in rotated scale words int32 [..] -> int16 [..]."""
    u = w.to(tl.uint32, bitcast=True)
    if WHICH == 1:
        u = u >> 16
    elif WHICH == 2:
        u = u >> 8
    elif WHICH == 3:
        u = (u << 8) | (u >> 24)
    if NVFP4 and not FP16:
        u = (u & 0x0FF0) | 0x7000
    else:
        u = u & 0x7F80
    return u.to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def e8m0_scale(w, WHICH: tl.constexpr):
    """Scale of code WHICH in rotated words of e8m0 bytes, times the 2^14 that fp16 codes lack."""
    field = word_scales(w, WHICH, False, True).to(tl.int32)
    return ((field << 16) + (14 << 23)).to(tl.float32, bitcast=True)


@triton.jit
def spread(s, N: tl.constexpr, WORDS: tl.constexpr, STEP: tl.constexpr):
    """[N, WORDS] -> [N, STEP], each value over STEP / WORDS neighbours."""
    return tl.reshape(tl.broadcast_to(s[:, :, None], (N, WORDS, STEP // WORDS)), (N, STEP))


@triton.jit
def e2m1_scaled(w, s0, s1, s2, s3, FP16: tl.constexpr, PORTABLE: tl.constexpr):
    """Half-words and multipliers, all int16 [N, STEP] -> four tensors of codes i times scale i.

    Times 2^-126 in bf16 and 2^-14 in fp16, both exact for the multipliers that the layout stores;
    the portable form returns float32.
    """
    if PORTABLE:
        b0, b1, b2, b3 = _e2m1_portable(w, FP16)
        return (
            _times(b0, s0, FP16),
            _times(b1, s1, FP16),
            _times(b2, s2, FP16),
            _times(b3, s3, FP16),
        )
    elif FP16:
        return tl.inline_asm_elementwise(
            _E2M1_FP16_SCALED,
            "=r,=r,=r,=r,r,r,r,r,r",
            [w, s0, s1, s2, s3],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            _E2M1_BF16,
            "=r,=r,=r,=r,r,r,r,r,r",
            [w, s0, s1, s2, s3],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def e2m1_fp16(w, PORTABLE: tl.constexpr):
    """Half-words int16 [N, STEP] -> four fp16 tensors of code * 2^-14."""
    if PORTABLE:
        b0, b1, b2, b3 = _e2m1_portable(w, True)
        return (
            b0.to(tl.float16, bitcast=True),
            b1.to(tl.float16, bitcast=True),
            b2.to(tl.float16, bitcast=True),
            b3.to(tl.float16, bitcast=True),
        )
    else:
        return tl.inline_asm_elementwise(
            _E2M1_FP16,
            "=r,=r,=r,=r,r",
            [w],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def int4_codes(w, FP16: tl.constexpr, PORTABLE: tl.constexpr):
    """Half-words int16 [N, STEP] -> four 16-bit float tensors of codes in [-8, 7]."""
    if PORTABLE:
        u = w.to(tl.int32)
        return (
            _int4_portable(u, FP16),
            _int4_portable(u >> 4, FP16),
            _int4_portable(u >> 8, FP16),
            _int4_portable(u >> 12, FP16),
        )
    elif FP16:
        return tl.inline_asm_elementwise(
            _INT4_FP16,
            "=r,=r,=r,=r,r",
            [w],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return tl.inline_asm_elementwise(
            _INT4_BF16,
            "=r,=r,=r,=r,r",
            [w],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )


@triton.jit
def beside(a, b):
    """[N, S] and [N, S] -> [N, 2S]: a, then b, in every row."""
    j = tl.permute(tl.join(a, b), (0, 2, 1))
    return tl.reshape(j, (a.shape[0], 2 * a.shape[1]))


@triton.jit
def four_beside(a, b, c, d):
    """Four times [N, S] -> [N, 4S], one after the other in every row."""
    j = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tl.permute(j, (0, 2, 3, 1)), (a.shape[0], 4 * a.shape[1]))


@triton.jit
def float16_of(x, FP16: tl.constexpr):
    """Exact or rounded value in the 16-bit type of the tensor core operands."""
    if FP16:
        return x.to(tl.float16)
    else:
        return x.to(tl.bfloat16)


@triton.jit
def widened(x):
    """16-bit floats to float32; bf16 by hand, because the interpreter reads its subnormals as 0."""
    if tl.bfloat16 == x.dtype:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def rounded(x, DTYPE: tl.constexpr, PORTABLE: tl.constexpr):
    """float32 to the nearest value of DTYPE; by hand where interpreted, which truncates to bf16."""
    if PORTABLE and tl.bfloat16 == DTYPE:
        u = x.to(tl.uint32, bitcast=True)
        nearest = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        nearest = tl.where(x == x, nearest, 0x7FC0)
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def nibble_value(code, INT4: tl.constexpr):
    """Codes int32 in 0..15 -> float32 value, exact."""
    if INT4:
        return ((code ^ 8) - 8).to(tl.float32)
    else:
        bits = ((code & 7) << 9) | ((code & 8) << 12)
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@triton.jit
def e8m0_value(byte):
    """Bytes int32 of e8m0 -> float32, exact; 255 is NaN, 0 a subnormal."""
    bits = tl.where(byte == 0, 0x00400000, byte << 23)
    bits = tl.where(byte == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _e2m1_portable(w, FP16: tl.constexpr):
    """Half-words int16 [N, S] -> uint16 bits of four tensors of codes."""
    lo, hi = tl.split(tl.reshape(w, (w.shape[0], w.shape[1] // 2, 2)))
    lo = lo.to(tl.uint16, bitcast=True).to(tl.uint32)
    u = lo | (hi.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)
    if FP16:
        r0 = u & 0x8E008E00
        r1 = _rotated_right(u, 3) & 0x8E008E00
        r2 = (_rotated_right(u, 1) & 0x80008000) | ((u << 3) & 0x0E000E00)
        r3 = (_rotated_right(u, 2) & 0x80008000) | ((u << 6) & 0x0E000E00)
    else:
        r0 = u & 0x81C081C0
        r1 = (u << 4) & 0x81C081C0
        r2 = _rotated_right(u, 6) & 0x81C081C0
        r3 = (_rotated_right(u, 2) & 0x81808180) | ((u << 6) & 0x00400040)
    return _halves(r0), _halves(r1), _halves(r2), _halves(r3)


@triton.jit
def _rotated_right(u, BY: tl.constexpr):
    return (u >> BY) | (u << (32 - BY))


@triton.jit
def _halves(u):
    """uint32 [N, S/2] -> uint16 [N, S], the low half first."""
    both = tl.join((u & 0xFFFF).to(tl.uint16), (u >> 16).to(tl.uint16))
    return tl.reshape(both, (u.shape[0], 2 * u.shape[1]))


@triton.jit
def _times(bits, scale, FP16: tl.constexpr):
    """float32 product of two 16-bit floats, given the bits of one and an int16 of the other."""
    if FP16:
        return widened(bits.to(tl.float16, bitcast=True)) * widened(
            scale.to(tl.float16, bitcast=True)
        )
    else:
        return widened(bits.to(tl.bfloat16, bitcast=True)) * widened(
            scale.to(tl.bfloat16, bitcast=True)
        )


@triton.jit
def _int4_portable(u, FP16: tl.constexpr):
    return float16_of(nibble_value(u & 15, True), FP16)
