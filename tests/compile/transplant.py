"""PTX of sm_120a, made to run on sm_90a: only the two FP4 instructions are replaced.

All else of the kernel stays as the compiler wrote it for sm_120a: addresses, copies, barriers,
order. The block-scaled MMA becomes four m16n8k16 of fp16 over the same registers, the conversion to
e2m1 seven comparisons a number; both as in cutemoe.dsl, written down a second time, in PTX.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from pathlib import Path

_LIST = r"\{([^}]*)\}"
MMA = re.compile(
    r"mma\.sync\.aligned\.kind::mxf4nvf4\.block_scale\.scale_vec::4X\.m16n8k64\.row\.col"
    rf"\.f32\.e2m1\.e2m1\.f32\.ue4m3 {_LIST}, {_LIST}, {_LIST}, {_LIST}, {_LIST}, {_LIST}, "
    rf"{_LIST}, {_LIST};"
)
CVT = re.compile(
    r"cvt\.rn\.satfinite\.e2m1x2\.f32 c, (\S+), (\S+); cvt\.u32\.u8 (\S+), c;"
)  # fmt: skip
TIES = ((0.25, "gt"), (0.75, "ge"), (1.25, "gt"), (1.75, "ge"), (2.5, "gt"), (3.5, "ge"), (5, "gt"))


def transplanted(ptx: str) -> tuple[str, int, int]:
    """The text for sm_90a, and how many MMAs and conversions were replaced."""
    ptx, mmas = MMA.subn(_mma, ptx.rstrip("\0"))
    ptx, conversions = CVT.subn(_convert, ptx)
    ptx = re.sub(r"^\.target sm_12\w+", ".target sm_90a", ptx, flags=re.MULTILINE)
    return re.sub(r"^\.version 9\.\d+", ".version 8.8", ptx, flags=re.MULTILINE), mmas, conversions


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


def _mma(m: re.Match[str]) -> str:
    d, a, b, c, (sfa,), _, (sfb,), _ = ([x.strip() for x in g.split(",")] for g in m.groups())
    out = [
        "{ .reg .b32 x, y, k, l, q, p, s<3>, f<3>, ra<4>, rb<2>, t<4>; .reg .b16 w;",
        "mov.b32 k, 0x74007400; mov.u32 l, %laneid; and.b32 q, l, 2; shl.b32 q, q, 2;",
        # rows g and g + 8 and column g have their scales in lanes 0, 1 and 0 of the quad
        "and.b32 l, l, 28;",
        f"shfl.sync.idx.b32 s0, {sfa}, l, 31, -1; shfl.sync.idx.b32 s2, {sfb}, l, 31, -1;",
        f"add.u32 l, l, 1; shfl.sync.idx.b32 s1, {sfa}, l, 31, -1;",
        *(f"mov.b32 t{i}, {c[i]};" for i in range(4)),
    ]
    for half in range(2):
        for i in range(3):
            out.append(
                f"shr.u32 p, s{i}, q; shr.u32 p, p, {16 * half}; prmt.b32 p, p, 0, 0x4400; "
                f"cvt.u16.u32 w, p; cvt.rn.f16x2.e4m3x2 f{i}, w;"
            )
        top, bottom, column = a[2 * half], a[2 * half + 1], b[half]
        for first in (0, 2):
            for i in range(2):
                shift = 4 * (first + i)
                out.append(_scaled(f"ra{2 * i}", top, shift, "f0"))
                out.append(_scaled(f"ra{2 * i + 1}", bottom, shift, "f1"))
                out.append(_scaled(f"rb{i}", column, shift, "f2"))
            out.append(
                "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {t0, t1, t2, t3}, "
                "{ra0, ra1, ra2, ra3}, {rb0, rb1}, {t0, t1, t2, t3};"
            )
    out += [f"mov.b32 {d[i]}, t{i};" for i in range(4)]
    return " ".join(out) + " }"


def _scaled(to: str, word: str, shift: int, scale: str) -> str:
    """Codes at `shift` and `shift` + 16 of a word, times a scale."""
    return (
        f"shr.u32 x, {word}, {shift}; and.b32 y, x, 0x70007; and.b32 x, x, 0x80008; "
        "shl.b32 y, y, 9; shl.b32 x, x, 12; or.b32 y, y, x; mul.rn.f16x2 y, y, k; "
        f"mul.rn.f16x2 {to}, y, {scale};"
    )


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
