"""Both policies of the block-scaled MMA on a model of a warp, against dense products."""

import ml_dtypes
import numpy as np
import pytest

from tests.dsl.lanes import E2M1, LANES, Float32, Sums, Uint32, device, e4m3, e8m0

JUNK = 0x7E7E7E7E
# scale 0x7f is NaN
SCALES = np.arange(0x7F)


def case(seed: int, uniform: bool = False) -> tuple[np.ndarray, ...]:
    """Codes of A [16, 64] and B [8, 64], scale bytes [16, 4] and [8, 4]."""
    r = np.random.default_rng(seed)
    A, B = r.integers(0, 16, (16, 64)), r.integers(0, 16, (8, 64))
    pick = np.full_like if uniform else lambda like, _: r.choice(SCALES, like.shape)
    return A, B, pick(np.zeros((16, 4), int), 0x38), pick(np.zeros((8, 4), int), 0x38)


def word(codes: np.ndarray, width: int) -> np.ndarray:
    return (codes.astype(np.uint64) << (width * np.arange(codes.shape[-1], dtype=np.uint64))).sum(
        -1
    )


def registers(A: np.ndarray, B: np.ndarray, SA: np.ndarray, SB: np.ndarray) -> tuple:
    """The fragments of the instruction; lanes that it ignores hold the greatest scale."""
    g, t = LANES.astype(int) // 4, LANES.astype(int) % 4

    def codes(X: np.ndarray, rows: np.ndarray, k: int) -> Uint32:
        return Uint32(word(np.stack([X[rows, 8 * t + k + i] for i in range(8)], -1), 4))

    a = [codes(A, g, 0), codes(A, g + 8, 0), codes(A, g, 32), codes(A, g + 8, 32)]
    b = [codes(B, g, 0), codes(B, g, 32)]
    sa = np.where(t < 2, word(SA, 8)[(g + 8 * t) % 16], JUNK)
    sb = np.where(t == 0, word(SB, 8)[g], JUNK)
    return a, b, Uint32(sa), Uint32(sb)


def product(policy, A, B, SA, SB) -> np.ndarray:
    a, b, sa, sb = registers(A, B, SA, SB)
    acc = [Sums(np.full(32, float(i))) for i in range(4)]
    policy.mma(acc, policy.a(a, sa), policy.b(b, sb))
    C, g, t = np.zeros((16, 8)), LANES // 4, LANES % 4
    for i in range(4):
        C[g + 8 * (i // 2), 2 * t + i % 2] = acc[i].v - i
    return C


def dense(A, B, SA, SB) -> np.ndarray:
    return (E2M1[A] * np.repeat(e4m3(SA), 16, 1)) @ (E2M1[B] * np.repeat(e4m3(SB), 16, 1)).T


@pytest.mark.parametrize("arch", [80, 90, 120, 121])
def test_equals_the_dense_product(arch):
    policy = device("mma").nvfp4_mma(arch)
    assert policy.native == (arch >= 120)
    for seed in range(12):
        x = case(seed)
        assert np.array_equal(product(policy, *x), dense(*x))


@pytest.mark.parametrize("arch", [80, 90, 120])
def test_a_nan_scale_breaks_its_row_and_column(arch):
    A, B, SA, SB = case(1)
    SA[3, 1], SB[5, 2] = 0x7F, 0x7F
    C = product(device("mma").nvfp4_mma(arch), A, B, SA, SB)
    want = np.zeros((16, 8), bool)
    want[3], want[:, 5] = True, True
    assert np.array_equal(np.isnan(C), want)


BUGS = {
    "scales of the other block": ("Uint32(lane & 2) * Uint32(4)", "Uint32(lane & 1) * Uint32(8)"),
    "rows swapped": ("self._scales(scales, 0), self._scales(scales, 1)",
                     "self._scales(scales, 1), self._scales(scales, 0)"),
    "B in another order of k": ("self.scaled(words[half] >>", "self.scaled(words[1 - half] >>"),
    "sign lost": ("Uint32(0x00080008)", "Uint32(0x00080000)"),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug):
    policy = device("mma", BUGS[bug]).nvfp4_mma(90)
    for seed in range(4):
        x = case(seed)
        assert not np.array_equal(product(policy, *x), dense(*x))


def test_uniform_scales_would_hide_bugs_of_scales():
    """Why cases draw a scale for every row and block."""
    x = case(1, uniform=True)
    for bug in ("scales of the other block", "rows swapped"):
        policy = device("mma", BUGS[bug]).nvfp4_mma(90)
        assert np.array_equal(product(policy, *x), dense(*x))


def test_scaled_codes_are_exact_in_fp16_and_their_products_in_float32():
    scaled = E2M1[:8, None] * e4m3(SCALES)[None]
    assert np.array_equal(scaled.astype(np.float16).astype(np.float64), scaled)
    values = np.unique(scaled)
    products = np.outer(values, values)
    assert np.array_equal(products.astype(np.float32).astype(np.float64), products)


def mx_product(policy, x: tuple[np.ndarray, ...], half: int) -> np.ndarray:
    """A [16, 64] times B [8, 64] under half of the four scales of every row."""
    a, b, sa, sb = registers(*x)
    acc = [Sums(np.full(32, float(i))) for i in range(4)]
    policy.mma(acc, policy.a(a, sa, half), policy.b(b, sb, half))
    C, g, t = np.zeros((16, 8)), LANES // 4, LANES % 4
    for i in range(4):
        C[g + 8 * (i // 2), 2 * t + i % 2] = acc[i].v - i
    return C


def mx_case(seed: int, low: int = 120, high: int = 135) -> tuple[np.ndarray, ...]:
    """Codes, and e8m0 bytes whose products double precision adds up exactly."""
    A, B, _, _ = case(seed)
    r = np.random.default_rng(seed + 100)
    return A, B, r.integers(low, high, (16, 4)), r.integers(low, high, (8, 4))


def mx_dense(x: tuple[np.ndarray, ...], half: int) -> np.ndarray:
    A, B, SA, SB = x
    SA, SB = (e8m0(s[:, 2 * half : 2 * half + 2]) for s in (SA, SB))
    return (E2M1[A] * np.repeat(SA, 32, 1)) @ (E2M1[B] * np.repeat(SB, 32, 1)).T


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("arch", [80, 90, 120, 121])
def test_mxfp4_equals_the_dense_product(arch, half):
    policy = device("mma").mxfp4_mma(arch)
    assert policy.native == (arch >= 120)
    for seed in range(12):
        x = mx_case(seed)
        assert np.array_equal(mx_product(policy, x, half), mx_dense(x, half))


@pytest.mark.parametrize("arch", [90, 120])
def test_an_mxfp4_scale_of_255_breaks_its_row_and_column(arch):
    A, B, SA, SB = mx_case(1)
    SA[3, 1], SB[5, 0] = 255, 255
    policy = device("mma").mxfp4_mma(arch)
    want = np.zeros((16, 8), bool)
    want[3], want[:, 5] = True, True
    assert np.array_equal(np.isnan(mx_product(policy, (A, B, SA, SB), 0)), want)
    assert not np.isnan(mx_product(policy, (A, B, SA, SB), 1)).any()


def test_every_pair_of_e8m0_scales():
    """The factors as float32 alone, against products of powers of two."""
    mma = device("mma")
    x = np.float32(1152)
    s, r = (g.flatten() for g in np.meshgrid(np.arange(256), np.arange(256)))
    with np.errstate(all="ignore"):
        want = (float(x) * e8m0(s) * e8m0(r)).astype(np.float32)
    a, b = (mma.factors_of_e8m0(Uint32(byte)) for byte in (s, r))
    got = mma.times_scales(Float32(np.full(s.shape, x)), a, b).v
    assert np.array_equal(got, want, equal_nan=True)
    zero = mma.times_scales(Float32(np.zeros(s.shape)), a, b).v
    assert np.array_equal(np.isnan(zero), (s == 255) | (r == 255)) and not zero[zero == zero].any()


MX_BUGS = {
    "columns of the next quad": ("8 * t + 4 * i)", "8 * t + 4 * (1 - i))"),
    "rows swapped": ("scales, quad + i)", "scales, quad + 1 - i)"),
    "scales of the other block": ("rows, half, block)", "rows, half, 1 - block)"),
    "the other half of the word": ("columns, half, block)", "columns, 1 - half, block)"),
    "B in another order of k": ("(words[block] >>", "(words[1 - block] >>"),
}


@pytest.mark.parametrize("bug", MX_BUGS)
def test_a_bug_planted_in_mxfp4_is_found(bug):
    policy = device("mma", MX_BUGS[bug]).mxfp4_mma(90)
    for seed in range(4):
        x = mx_case(seed)
        assert not np.array_equal(mx_product(policy, x, 1), mx_dense(x, 1))


def mixed_product(policy, x: tuple[np.ndarray, ...], dtype: str) -> np.ndarray:
    """Numbers A [16, 64] times codes B [8, 64] under their scales."""
    numbers, B, SB = x
    kind = ml_dtypes.bfloat16 if dtype == "bf16" else np.float16
    g, t = LANES.astype(int) // 4, LANES.astype(int) % 4

    def words(rows: np.ndarray, k: int) -> list[Uint32]:
        """The four words with eight numbers of a row, in every lane."""
        own = np.stack([numbers[rows, 8 * t + k + i] for i in range(8)], -1).astype(kind)
        packed = np.ascontiguousarray(own).view(np.uint32)
        return [Uint32(packed[:, i]) for i in range(4)]

    _, b, _, sb = registers(np.zeros((16, 64), int), B, np.zeros((16, 4), int), SB)
    a = [words(g, 0), words(g + 8, 0), words(g, 32), words(g + 8, 32)]
    acc = [Sums(np.full(32, float(i))) for i in range(4)]
    policy.mma(acc, policy.a(a), policy.b(b, sb))
    C = np.zeros((16, 8))
    for i in range(4):
        C[g + 8 * (i // 2), 2 * t + i % 2] = acc[i].v - i
    return C


def mixed_case(seed: int) -> tuple[np.ndarray, ...]:
    """Small integers A, codes and scale bytes of B."""
    _, B, _, SB = case(seed)
    return np.random.default_rng(seed + 200).integers(-64, 65, (16, 64)).astype(float), B, SB


def mixed_dense(x: tuple[np.ndarray, ...]) -> np.ndarray:
    numbers, B, SB = x
    return numbers @ (E2M1[B] * np.repeat(e4m3(SB), 16, 1)).T


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("arch", [80, 90, 120])
def test_numbers_times_codes_equal_the_dense_product(arch, dtype):
    policy = device("mma").mixed_mma(arch, dtype)
    for seed in range(12):
        x = mixed_case(seed)
        assert np.array_equal(mixed_product(policy, x, dtype), mixed_dense(x))
    numbers, B, SB = mixed_case(1)
    SB[5, 2] = 0x7F
    broken = np.isnan(mixed_product(policy, (numbers, B, SB), dtype))
    assert broken[:, 5].all() and broken.sum() == 16


def test_scaled_codes_are_exact_in_bf16():
    """Every code under every scale, subnormal ones too."""
    policy = device("mma").mixed_mma(90, "bf16")
    for byte in SCALES:
        pair = policy.pair(Uint32(np.full(16, byte)))
        code = np.arange(16, dtype=np.uint32)
        got = policy.scaled(Uint32(code | (15 - code) << 16), pair).v
        both = np.ascontiguousarray(got[:, None]).view(ml_dtypes.bfloat16).astype(np.float64)
        want = E2M1[np.stack([code, 15 - code], -1)] * e4m3(byte)
        assert np.array_equal(both, want)
        assert np.array_equal(np.signbit(both), np.signbit(want))


MIXED_BUGS = {
    "halves swapped": ("(0x5410, 0x7632)[i]", "(0x5410, 0x7632)[1 - i]"),
    "the other words of A": ("row[q // 2], row[2 + q // 2]", "row[1 - q // 2], row[3 - q // 2]"),
    "rows swapped": ("in numbers[at : at + 2]", "in numbers[at : at + 2][::-1]"),
    "B in another order of k": ("self.scaled(words[half] >>", "self.scaled(words[1 - half] >>"),
}


@pytest.mark.parametrize("bug", MIXED_BUGS)
def test_a_bug_planted_in_mixed_operands_is_found(bug):
    policy = device("mma", MIXED_BUGS[bug]).mixed_mma(90, "bf16")
    for seed in range(4):
        x = mixed_case(seed)
        assert not np.array_equal(mixed_product(policy, x, "bf16"), mixed_dense(x))
