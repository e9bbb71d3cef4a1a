"""The texts that replace FP4 instructions, executed without a GPU, give the bits of cutemoe.dsl."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from tests.compile.ptx_lanes import Fused, Registers, execute, fma
from tests.compile.transplant import transplanted
from tests.dsl.lanes import LANES, Float32, device
from tests.dsl.test_codec import TIES, around
from tests.dsl.test_mma import case, dense, mx_case, mx_dense, registers

INSTRUCTION = {
    "nvfp4": "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col"
    ".f32.e2m1.e2m1.f32.ue4m3",
    "mxfp4": "mma.sync.aligned.kind::mxf4.block_scale.scale_vec::2X.m16n8k64.row.col"
    ".f32.e2m1.e2m1.f32.ue8m0",
}
START = tuple(np.float32(i - 1.5) for i in range(4))


def replaced(format: str, half: int = 0) -> str:
    """What stands in the place of one instruction."""
    lists = ["{%d0, %d1, %d2, %d3}", "{%a0, %a1, %a2, %a3}", "{%b0, %b1}", "{%c0, %c1, %c2, %c3}"]
    byte = f"{{{2 * half}, 0}}"
    text = f"{INSTRUCTION[format]} {', '.join(lists)}, {{%sa}}, {byte}, {{%sb}}, {byte};"
    found, mmas, conversions = transplanted(text)
    assert (mmas, conversions) == (1, 0)
    return found


def by_text(format: str, x: tuple[np.ndarray, ...], half: int = 0) -> list[np.ndarray]:
    """The four sums of every lane after the text."""
    a, b, sa, sb = registers(*x)
    r: Registers = {f"%a{i}": a[i].v for i in range(4)}
    r |= {f"%b{i}": b[i].v for i in range(2)} | {"%sa": sa.v, "%sb": sb.v}
    r |= {f"%c{i}": np.full(32, START[i]).view(np.uint32) for i in range(4)}
    execute(replaced(format, half), r)
    return [r[f"%d{i}"].view(np.float32) for i in range(4)]


def by_policy(format: str, x: tuple[np.ndarray, ...], half: int = 0) -> list[np.ndarray]:
    """The same by the emulation of cutemoe.dsl, with its products fused as the DSL does."""
    mma = device("mma", sums=Fused)
    policy = mma.nvfp4_mma(90) if format == "nvfp4" else mma.mxfp4_mma(90)
    a, b, sa, sb = registers(*x)
    acc = [Fused(np.full(32, s)) for s in START]
    which = () if format == "nvfp4" else (half,)
    policy.mma(acc, policy.a(a, sa, *which), policy.b(b, sb, *which))
    return [v.v for v in acc]


def assert_same_bits(got: list[np.ndarray], want: list[np.ndarray]) -> None:
    """Zeros by their signs too; every NaN is the same to a card."""
    for x, y in zip(got, want, strict=True):
        nan = np.isnan(x)
        assert np.array_equal(nan, np.isnan(y))
        assert np.array_equal(x.view(np.uint32)[~nan], y.view(np.uint32)[~nan])


def matrix(sums: list[np.ndarray]) -> np.ndarray:
    """Sums of all lanes [16, 8], less what they began with, in double precision."""
    C, g, t = np.zeros((16, 8)), LANES // 4, LANES % 4
    for i in range(4):
        C[g + 8 * (i // 2), 2 * t + i % 2] = sums[i].astype(np.float64) - START[i]
    return C


@pytest.mark.parametrize("seed", range(12))
def test_the_text_for_nvfp4_gives_the_bits_of_the_emulation(seed: int) -> None:
    x = case(seed)
    assert_same_bits(by_text("nvfp4", x), by_policy("nvfp4", x))
    A, B, _, _ = x
    r = np.random.default_rng(seed)
    # scales 1/2, 1 and 2: every sum is exact
    exact = A, B, *(r.choice([0x30, 0x38, 0x40], s) for s in ((16, 4), (8, 4)))
    assert np.array_equal(matrix(by_text("nvfp4", exact)), dense(*exact))


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("seed", range(12))
def test_the_text_for_mxfp4_gives_the_bits_of_the_emulation(seed: int, half: int) -> None:
    """Scales near 1, then any, then the ends of their range and their neighbours."""
    A, B, SA, SB = mx_case(seed)
    r = np.random.default_rng(seed)
    bytes_of = {
        "near": (SA, SB),
        "any": (r.integers(0, 256, SA.shape), r.integers(0, 256, SB.shape)),
        "ends": tuple(r.choice([0, 1, 2, 126, 127, 253, 254, 255], s.shape) for s in (SA, SB)),
        "small": (r.integers(0, 70, SA.shape), r.integers(40, 70, SB.shape)),
        "great": (r.integers(180, 255, SA.shape), r.integers(180, 200, SB.shape)),
    }
    for scales in bytes_of.values():
        x = A, B, *scales
        assert_same_bits(by_text("mxfp4", x, half), by_policy("mxfp4", x, half))
    exact = mx_case(seed, 126, 129)
    assert np.array_equal(matrix(by_text("mxfp4", exact, half)), mx_dense(exact, half))


def test_a_scale_of_255_breaks_its_row_and_column_of_the_text() -> None:
    A, B, SA, SB = mx_case(1)
    SA[3, 1], SB[5, 0] = 255, 255
    want = np.zeros((16, 8), bool)
    want[3], want[:, 5] = True, True
    x = A, B, SA, SB
    assert np.array_equal(np.isnan(matrix(by_text("mxfp4", x, 0))), want)
    assert not np.isnan(matrix(by_text("mxfp4", x, 1))).any()


BUGS = {
    "rows swapped": ("mul.rn.f32 x, u0, v2", "mul.rn.f32 x, u1, v2"),
    "columns of one lane": ("shl.b32 l, l, 3", "shl.b32 l, l, 2"),
    "another block": ("shr.u32 x, s2, 16", "shr.u32 x, s2, 24"),
    "one factor alone": ("mul.rn.f32 y, v0, u2", "mov.b32 y, v0"),
    "sums that do not begin at zero": ("mov.b32 q1, 0", "mov.b32 q1, t1"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_planted_in_the_text_for_mxfp4_is_found(
    bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = replaced("mxfp4", 1)
    assert BUGS[bug][0] in right
    monkeypatch.setitem(globals(), "replaced", lambda *_: right.replace(*BUGS[bug]))
    for seed in range(4):
        x = mx_case(seed)
        got, want = (f("mxfp4", x, 1) for f in (by_text, by_policy))
        assert not all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_text_of_a_conversion_gives_the_codes_of_the_emulation() -> None:
    text = "cvt.rn.satfinite.e2m1x2.f32 c, %high, %low; cvt.u32.u8 %to, c;"
    found, mmas, conversions = transplanted(text)
    assert (mmas, conversions) == (0, 1)
    random = np.random.default_rng(0).normal(size=400).astype(np.float32) * 3
    x = np.concatenate([around(TIES), random, np.array([1e-45, 1e-38], np.float32)])
    x = np.concatenate([x, -x])
    x = np.resize(x, (-(-len(x) // 32), 32))
    encode: Any = device("codec").encode_e2m1
    for low, high in zip(x, x[::-1], strict=True):
        r: Registers = {"%low": low.view(np.uint32), "%high": high.view(np.uint32)}
        execute(found, r)
        codes = [[int(encode(Float32(v)).v) for v in part] for part in (low, high)]
        assert r["%to"].tolist() == [a | b << 4 for a, b in zip(*codes, strict=True)]


def test_an_fma_rounds_once() -> None:
    """Against exact fractions."""
    r = np.random.default_rng(0)
    n = 2000
    x, y = (r.normal(size=n).astype(np.float32) for _ in range(2))
    z = (r.normal(size=n) * 2.0 ** r.integers(-40, 40, n)).astype(np.float32)
    got = fma(x, y, z)
    for a, b, c, d in zip(x, y, z, got, strict=True):
        exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
        near = [np.nextafter(d, np.float32(s * np.inf)) for s in (-1, 1)]
        error = abs(Fraction(float(d)) - exact)
        assert all(error <= abs(Fraction(float(o)) - exact) for o in near)
    # 3705353 * 9273 is 2^35 + 1: the double has a tie, which the part it lost decides
    x, y = np.float32(3705353), np.float32(9273 * 2.0**-59)
    assert np.float32(float(x) * float(y) + 1.0) == 1
    assert fma(x, y, np.float32(1)) == np.float32(1 + 2**-23)
