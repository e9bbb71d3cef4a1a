"""A warp without a GPU: DSL values as arrays of lanes, and the PTX that cutemoe.dsl writes.

Importing `device("codec")` or `device("mma")` gives the module's own source, executed with these
values in place of CuTe's, so that tests run the text that kernels are traced from. `edits` plant
bugs. The few instructions are modelled from the PTX ISA: operands by their place in the text.
"""

from __future__ import annotations

import importlib.util
import re
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

LANES = np.arange(32, dtype=np.uint32)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


class Value:
    """One number in every lane, or one for all."""

    dtype: Any = None
    # of the same number in a register
    register: Any = None

    def __init__(self, x: Any) -> None:
        x = x.v if isinstance(x, Value) else x
        with np.errstate(all="ignore"):
            self.v = np.asarray(x).astype(self.dtype)

    def bitcast(self, kind: type[Value]) -> Value:
        return kind(self.v.view(kind.register or kind.dtype))

    def _with(self, other: Any, op: Any, result: type[Value] | None = None) -> Any:
        other = type(self)(other)
        with np.errstate(all="ignore"):
            return (result or type(self))(op(self.v, other.v))

    def __add__(self, o: Any) -> Any:
        return self._with(o, np.add)

    def __sub__(self, o: Any) -> Any:
        return self._with(o, np.subtract)

    def __mul__(self, o: Any) -> Any:
        return self._with(o, np.multiply)

    def __and__(self, o: Any) -> Any:
        return self._with(o, np.bitwise_and)

    def __or__(self, o: Any) -> Any:
        return self._with(o, np.bitwise_or)

    def __lshift__(self, o: Any) -> Any:
        return self._with(o, np.left_shift)

    def __rshift__(self, o: Any) -> Any:
        return self._with(o, np.right_shift)

    def __lt__(self, o: Any) -> Any:
        return self._with(o, np.less, Bool)

    def __gt__(self, o: Any) -> Any:
        return self._with(o, np.greater, Bool)


class Uint32(Value):
    dtype = np.uint32


class Float32(Value):
    dtype = np.float32


class Bool(Value):
    dtype = np.bool_

    def __bool__(self) -> bool:
        return bool(self.v)


def e4m3(byte: Any) -> np.ndarray:
    """Values of e4m3 bytes."""
    return np.asarray(byte).astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def inline_ptx(text: str, write_only_types: list[type[Value]], read_only_args: list[Any]) -> Any:
    """What the text computes, in every lane."""
    args = [a if isinstance(a, Value) else Uint32(a) for a in read_only_args]
    kind = write_only_types[0]
    if text == "mov.b32 {$w0}, 0;":
        return kind(np.zeros(LANES.shape))
    if text.startswith("mma.sync"):
        parts = re.findall(r"\{(\{\$\w+\}(?:, \{\$\w+\})*|[02], 0)\}", text)
        groups = [[args[int(n)].v for n in re.findall(r"\$r(\d+)", p)] for p in parts]
        if "m16n8k64" in text:
            sums = _block_scaled(groups, "2X" in text, [int(parts[i][0]) for i in (5, 7)])
        else:
            sums = m16n8k16(groups, _numbers if "bf16" in text else _halves)
        return [kind(c) for c in sums]
    with np.errstate(all="ignore"):
        if text.startswith("div.rn.f32"):
            return kind(args[0].v / args[1].v)
        if text.startswith("prmt.b32"):
            both = np.stack([args[0].v, args[1].v], -1).view(np.uint8)
            code = int(text.split(", ")[-1].strip(";"))
            picked = [code >> (4 * i) & 7 for i in range(4)]
            return kind(np.ascontiguousarray(both[:, picked]).view(np.uint32)[:, 0])
        if "fma.rn.bf16x2" in text and "0x80008000" in text:
            product = _numbers(args[0].v) * _numbers(args[1].v)
            product = np.ascontiguousarray(product.astype(ml_dtypes.bfloat16))
            return kind(product.view(np.uint32)[..., 0])
        if "mul.rn.f16x2" in text:
            return kind(_fp16(_halves(args[0].v) * _halves(args[1].v)))
        if "cvt.rn.f16x2.e4m3x2" in text:
            value = e4m3(args[0].v & 0xFF).astype(np.float16)
            return kind(_fp16(np.stack([value, value], -1)))
    raise NotImplementedError(text)


def _halves(word: np.ndarray) -> np.ndarray:
    """Words [..] -> fp16 [.., 2]."""
    return np.ascontiguousarray(word.reshape(*word.shape, 1)).view(np.float16)


def _numbers(word: np.ndarray) -> np.ndarray:
    """Words [..] of two bf16 each -> their values [.., 2]."""
    pair = np.ascontiguousarray(word.reshape(*word.shape, 1)).view(ml_dtypes.bfloat16)
    return pair.astype(np.float64)


def _fp16(pairs: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(pairs.astype(np.float16)).view(np.uint32)[..., 0]


def m16n8k16(groups: list[list[np.ndarray]], pairs: Any = _halves) -> list[np.ndarray]:
    """Sums in double precision from the registers of D, which are not read, A, B and C.

    pairs: words to numbers.
    """
    _, a, b, c = groups
    A, B = np.zeros((16, 16)), np.zeros((16, 8))
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for r, (row, k) in enumerate(((0, 0), (8, 0), (0, 8), (8, 8))):
            A[g + row, 2 * t + k : 2 * t + k + 2] = pairs(a[r])[lane]
        for r in range(2):
            B[2 * t + 8 * r : 2 * t + 8 * r + 2, g] = pairs(b[r])[lane]
    return _spread(A @ B, c)


def e8m0(byte: Any) -> np.ndarray:
    """Values of e8m0 bytes."""
    byte = np.asarray(byte).astype(np.int64)
    return np.where(byte == 255, np.nan, np.exp2((byte - 127).astype(np.float64)))


def _block_scaled(groups: list[list[np.ndarray]], wide: bool, first: list[int]) -> list[np.ndarray]:
    """wide: scales are e8m0 of 32 k; first: of the bytes of A's and B's scale words that count."""
    _, a, b, c, (sfa,), _, (sfb,), _ = groups
    decode, block = (e8m0, 32) if wide else (e4m3, 16)
    A, B = np.zeros((16, 64)), np.zeros((64, 8))
    for lane in range(32):
        g, t = lane // 4, lane % 4
        for i in range(8):
            for r in range(4):
                row, k = g + 8 * (r % 2), 8 * t + i + 32 * (r // 2)
                # rows g and g + 8 have their scales in lanes 4 g and 4 g + 1
                byte = first[0] + k // block
                scale = decode(sfa[4 * g + r % 2] >> (8 * byte) & 0xFF)
                A[row, k] = E2M1[a[r][lane] >> (4 * i) & 15] * scale
            for r in range(2):
                k = 8 * t + i + 32 * r
                scale = decode(sfb[4 * g] >> (8 * (first[1] + k // block)) & 0xFF)
                B[k, g] = E2M1[b[r][lane] >> (4 * i) & 15] * scale
    return _spread(A @ B, c)


def _spread(D: np.ndarray, c: list[np.ndarray]) -> list[np.ndarray]:
    g, t = LANES // 4, LANES % 4
    places = ((g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1))
    return [c[i] + D[at] for i, at in enumerate(places)]


class Sums(Float32):
    """Accumulators without rounding, so that a test can compare exactly."""

    dtype = np.float64
    register = np.float32


def device(name: str, *edits: tuple[str, str], sums: type[Float32] = Sums) -> Any:
    """The module cutemoe.dsl.<name> over lanes; every edit replaces a text that is there.

    sums: what float32 is in mma.
    """
    spec = importlib.util.find_spec("cutemoe.dsl")
    assert spec is not None and spec.submodule_search_locations is not None
    source = (Path(spec.submodule_search_locations[0]) / f"{name}.py").read_text()
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    body = "\n".join(line for line in source.splitlines() if not line.startswith("from c"))
    body = body.replace("import cutlass.cute as cute", "")
    arch = types.SimpleNamespace(
        inline_ptx=inline_ptx,
        lane_idx=lambda: LANES.astype(np.int64),
        sync_warp=lambda: None,
        shuffle_sync=lambda x, lane: type(x)(x.v[lane]),
    )
    found: dict[str, Any] = {
        "cute": types.SimpleNamespace(arch=arch, jit=lambda f: f),
        "const_expr": lambda x: x,
        "Uint32": Uint32,
        "Float32": sums if name == "mma" else Float32,
    }
    if name == "mma":
        codec = device("codec")
        found.update(Codec=codec.Codec, mul_f16x2=codec.mul_f16x2, ptx=codec.ptx)
    found["__name__"] = f"lanes.{name}"
    exec(compile(body, f"{name}.py", "exec"), found)
    return types.SimpleNamespace(**found)
