"""Float functions of IEEE operations and bit patterns: the same results on every card."""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def exp(x):
    """e^x in float32 to one ulp; tl.exp is the approximate instruction, 2^-22 and |x| * 2^-24."""
    y = tl.minimum(tl.maximum(x, -104.0), 89.0)
    n = tl.floor(y * 1.4426950408889634 + 0.5)
    # ln 2 in two parts: n times the first is exact
    r = tl.fma(n, -0.693359375 + tl.zeros_like(n), y)
    r = tl.fma(n, 2.1219444005469057e-4 + tl.zeros_like(n), r)
    p = 1.9875691500e-4 + tl.zeros_like(r)
    p = tl.fma(p, r, 1.3981999507e-3 + tl.zeros_like(r))
    p = tl.fma(p, r, 8.3334519073e-3 + tl.zeros_like(r))
    p = tl.fma(p, r, 4.1665795894e-2 + tl.zeros_like(r))
    p = tl.fma(p, r, 1.6666665459e-1 + tl.zeros_like(r))
    p = tl.fma(p, r, 5.0000001201e-1 + tl.zeros_like(r))
    p = tl.fma(p, r * r, r) + 1.0
    # 2^n in two normal factors: n reaches -150 and 128
    i = n.to(tl.int32)
    half = i >> 1
    low = ((half + 127) << 23).to(tl.float32, bitcast=True)
    high = ((i - half + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x == x, p * low * high, x)


@triton.jit
def library_exp(x, PORTABLE: tl.constexpr):
    """e^x in float32 of CUDA's library: the bits that torch's operators get on a GPU."""
    if PORTABLE:
        return exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x) in float32."""
    return tl.div_rn(1.0 + tl.zeros_like(x), 1.0 + exp(-x))


@triton.jit
def encode_e4m3(y):
    """float32 -> bits of e4m3fn, nearest even, saturating; NaN and infinity give NaN 0x7f."""
    bits = y.to(tl.int32, bitcast=True)
    a = tl.minimum(tl.abs(y), 448.0)
    m = a.to(tl.int32, bitcast=True)
    normal = ((m + 0x7FFFF + ((m >> 20) & 1)) >> 20) - (120 << 3)
    # below 2^-6 the codes are multiples of 2^-9: rounded where a float32 has unit steps
    small = (a * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(a < 0.015625, small, normal) | ((bits >> 24) & 0x80)
    return tl.where((bits & 0x7F800000) == 0x7F800000, 0x7F, code).to(tl.uint8)


@triton.jit
def decode_e4m3(code):
    """Bits of e4m3fn -> float32, exact."""
    c = code.to(tl.int32)
    value = (((c & 0x7F) << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where((c & 0x78) == 0, (c & 7).to(tl.float32) * 0.001953125, value)
    value = tl.where((c & 0x7F) == 0x7F, float("nan"), value)
    # -value would be 0 - value, which loses the sign of 0
    return tl.where((c & 0x80) != 0, value * -1.0, value)


@triton.jit
def encode_e2m1(x):
    """float32 -> e2m1 code 0..15, nearest even, saturating at 6; NaN gives a zero of its sign."""
    a = tl.abs(x)
    code = (a > 0.25).to(tl.int32) + (a >= 0.75).to(tl.int32) + (a > 1.25).to(tl.int32)
    code += (a >= 1.75).to(tl.int32) + (a > 2.5).to(tl.int32) + (a >= 3.5).to(tl.int32)
    code += (a > 5.0).to(tl.int32)
    return code | ((x.to(tl.int32, bitcast=True) >> 28) & 8)
