"""PTX of sm_120a, made to run on sm_90a: only the FP4 instructions are replaced.

All else of the kernel stays as the compiler wrote it for sm_120a: addresses, copies, barriers,
order. A block-scaled MMA becomes four m16n8k16 of fp16 over the same registers, the conversion to
e2m1 seven comparisons a number; all as in cutemoe.dsl, written down a second time, in PTX.

Under e4m3 scales (nvfp4) codes are scaled before they are multiplied. Under e8m0 scales (mxfp4) the
sums of 32 k begin at zero and are scaled, and the last of those products is one FMA with the
addition to the accumulator: so does the DSL compile `acc + times_scales(..)`. It tells where the
product is no normal number.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from pathlib import Path

_OPERANDS = ", ".join([r"\{([^}]*)\}"] * 8)


def _pattern(kind: str, vector: str, scale: str) -> re.Pattern[str]:
    """One block-scaled MMA, its eight lists of operands as groups."""
    return re.compile(
        rf"mma\.sync\.aligned\.kind::{kind}\.block_scale\.scale_vec::{vector}\.m16n8k64\.row\.col"
        rf"\.f32\.e2m1\.e2m1\.f32\.{scale} {_OPERANDS};"
    )


NVFP4 = _pattern("mxf4nvf4", "4X", "ue4m3")
MXFP4 = _pattern("mxf4", "2X", "ue8m0")
CVT = re.compile(
    r"cvt\.rn\.satfinite\.e2m1x2\.f32 c, (\S+), (\S+); cvt\.u32\.u8 (\S+), c;"
)  # fmt: skip
TIES = ((0.25, "gt"), (0.75, "ge"), (1.25, "gt"), (1.75, "ge"), (2.5, "gt"), (3.5, "ge"), (5, "gt"))


def transplanted(ptx: str) -> tuple[str, int, int]:
    """The text for sm_90a, and how many MMAs and conversions were replaced."""
    ptx, mmas = NVFP4.subn(_mma, ptx.rstrip("\0"))
    ptx, more = MXFP4.subn(_mma_mxfp4, ptx)
    ptx, conversions = CVT.subn(_convert, ptx)
    ptx = re.sub(r"^\.target sm_12\w+", ".target sm_90a", ptx, flags=re.MULTILINE)
    ptx = re.sub(r"^\.version 9\.\d+", ".version 8.7", ptx, flags=re.MULTILINE)
    return ptx, mmas + more, conversions


def assembled(ptx: str) -> str:
    """What the ptxas of Triton's wheel says of a text for sm_90a."""
    import triton

    assert triton.__file__ is not None
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [tool, "-arch=sm_90a", "-v", path, "-o", path.with_suffix(".cubin")]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stderr


def _operands(m: re.Match[str]) -> list[list[str]]:
    return [[x.strip() for x in g.split(",")] for g in m.groups()]


def _mma(m: re.Match[str]) -> str:
    d, a, b, c, (sfa,), _, (sfb,), _ = _operands(m)
    out = [
        "{ .reg .b32 x, y, k, l, q, p, s<3>, f<3>, ra<4>, rb<2>, t<4>; .reg .b16 w;",
        "mov.b32 k, 0x74007400; mov.u32 l, %laneid; and.b32 q, l, 2; shl.b32 q, q, 2;",
        # rows g and g + 8 and column g have their scales in lanes 0, 1 and 0 of the quad
        "and.b32 l, l, 28;",
        _from_lane("s0", sfa, "l") + _from_lane("s2", sfb, "l"),
        "add.u32 l, l, 1;" + _from_lane("s1", sfa, "l"),
        *(f"mov.b32 t{i}, {c[i]};" for i in range(4)),
    ]
    for half in range(2):
        for i in range(3):
            out.append(
                f"shr.u32 p, s{i}, q; shr.u32 p, p, {16 * half}; prmt.b32 p, p, 0, 0x4400; "
                f"cvt.u16.u32 w, p; cvt.rn.f16x2.e4m3x2 f{i}, w;"
            )
        out += _products(a[2 * half : 2 * half + 2], b[half], "t", ("f0", "f1", "f2"))
    out += [f"mov.b32 {d[i]}, t{i};" for i in range(4)]
    return " ".join(out) + " }"


def _mma_mxfp4(m: re.Match[str]) -> str:
    d, a, b, c, (sfa,), (first_a, _), (sfb,), (first_b, _) = _operands(m)
    out = [
        "{ .reg .b32 x, y, k, l, s<4>, u<4>, v<4>, ra<4>, rb<2>, q<4>, t<4>; .reg .pred z;",
        # sums begin at zero: without it ptxas computes many at once, and spills
        "bar.warp.sync -1; mov.b32 k, 0x74007400; mov.u32 x, %laneid;",
        # rows g and g + 8 have their scales in lanes 0 and 1 of the quad
        "and.b32 l, x, 28;" + _from_lane("s0", sfa, "l"),
        "add.u32 l, l, 1;" + _from_lane("s1", sfa, "l"),
        # the columns of this lane's sums, 2 t and 2 t + 1, in lanes 8 t and 8 t + 4
        "and.b32 l, x, 3; shl.b32 l, l, 3;" + _from_lane("s2", sfb, "l"),
        "add.u32 l, l, 4;" + _from_lane("s3", sfb, "l"),
        *(f"mov.b32 t{i}, {c[i]};" for i in range(4)),
    ]
    for block in range(2):
        for i in range(4):
            byte = int(first_a if i < 2 else first_b) + block
            out.append(_factors(f"u{i}", f"v{i}", f"s{i}", 8 * byte))
        out += [f"mov.b32 q{i}, 0;" for i in range(4)]
        out += _products(a[2 * block : 2 * block + 2], b[block], "q")
        for i in range(4):
            row, column = i // 2, 2 + i % 2
            out.append(
                f"mul.rn.f32 x, u{row}, v{column}; mul.rn.f32 x, q{i}, x; "
                f"mul.rn.f32 y, v{row}, u{column}; fma.rn.f32 t{i}, x, y, t{i};"
            )
    out += [f"mov.b32 {d[i]}, t{i};" for i in range(4)]
    return " ".join(out) + " }"


def _from_lane(to: str, word: str, lane: str) -> str:
    return f" shfl.sync.idx.b32 {to}, {word}, {lane}, 31, -1;"


def _factors(u: str, v: str, word: str, shift: int) -> str:
    """Two powers of two whose product is what an e8m0 byte means; NaN of 255."""
    return (
        f"shr.u32 x, {word}, {shift}; and.b32 x, x, 255; setp.eq.u32 z, x, 255; "
        f"shr.u32 y, x, 1; sub.u32 {v}, x, y; "
        f"add.u32 {u}, y, 64; shl.b32 {u}, {u}, 23; selp.b32 {u}, 0x7fc00000, {u}, z; "
        f"add.u32 {v}, {v}, 63; shl.b32 {v}, {v}, 23; selp.b32 {v}, 0x7fc00000, {v}, z;"
    )


def _products(a: list[str], b: str, sums: str, scales: tuple[str, ...] = ()) -> list[str]:
    """sums += codes of rows a and of column b in one word each: 32 k, as two m16n8k16."""
    top, bottom, column = scales or ("",) * 3
    out = []
    for first in (0, 2):
        for i in range(2):
            shift = 4 * (first + i)
            out.append(_values(f"ra{2 * i}", a[0], shift, top))
            out.append(_values(f"ra{2 * i + 1}", a[1], shift, bottom))
            out.append(_values(f"rb{i}", b, shift, column))
        acc = ", ".join(f"{sums}{i}" for i in range(4))
        out.append(
            f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{{acc}}}, "
            f"{{ra0, ra1, ra2, ra3}}, {{rb0, rb1}}, {{{acc}}};"
        )
    return out


def _values(to: str, word: str, shift: int, scale: str = "") -> str:
    """Codes at `shift` and `shift` + 16 of a word, times a scale where there is one."""
    text = (
        f"shr.u32 x, {word}, {shift}; and.b32 y, x, 0x70007; and.b32 x, x, 0x80008; "
        "shl.b32 y, y, 9; shl.b32 x, x, 12; or.b32 y, y, x; "
    )
    if not scale:
        return text + f"mul.rn.f16x2 {to}, y, k;"
    return text + f"mul.rn.f16x2 y, y, k; mul.rn.f16x2 {to}, y, {scale};"


def _convert(m: re.Match[str]) -> str:
    high, low, to = m.groups()
    out = ["{ .reg .f32 a; .reg .pred z; .reg .b32 n, u, v;"]
    for source, code in ((low, "u"), (high, "v")):
        out.append(f"mov.b32 n, {source}; and.b32 n, n, 0x7fffffff; mov.b32 a, n;")
        out.append(f"mov.u32 {code}, 0;")
        for tie, compare in TIES:
            bits = struct.pack(">f", tie).hex().upper()
            out.append(f"setp.{compare}.f32 z, a, 0f{bits}; selp.u32 n, 1, 0, z;")
            out.append(f"add.u32 {code}, {code}, n;")
        out.append(f"mov.b32 n, {source}; shr.u32 n, n, 28; and.b32 n, n, 8;")
        out.append(f"or.b32 {code}, {code}, n;")
    out.append(f"shl.b32 v, v, 4; or.b32 {to}, u, v; }}")
    return " ".join(out)
