"""What the Hopper kernel makes of packed words, every scale and every code, without a GPU.

The module's own source runs on arrays of lanes; its PTX is interpreted instruction by instruction.
"""

from __future__ import annotations

import re
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import cutemoe
from cutemoe.layouts import sm90_rs_w4 as layout
from tests import strategies as draw
from tests.dsl.lanes import Float32, Uint32

RECIPES = [
    (weight, activations, group)
    for activations, weights in layout.WEIGHTS.items()
    for weight in weights
    for group in {"mxfp4": (32,), "nvfp4": (16,), "int4": (32, 64, 128)}[weight]
]
OPERANDS = {
    "bf16": (np.uint16, ml_dtypes.bfloat16),
    "fp16": (np.uint16, np.float16),
    "fp8": (np.uint8, ml_dtypes.float8_e4m3fn),
}
SOURCE = Path(layout.__file__).parents[1] / "gemm" / "cute_decode.py"


def decode(monkeypatch: pytest.MonkeyPatch, edit: tuple[str, str] = ("", "")) -> Any:
    """`hook` of the module, executed with stand-ins for the DSL; `edit` plants a bug."""
    arch = types.SimpleNamespace(shf=lambda a, b, n, kind: a << n | b >> 32 - n)
    parts = {
        "cutlass": {"Uint32": Uint32, "Float32": Float32},
        "cutlass.cute": {"arch": arch},
        "cutlass._mlir": {},
        "cutlass._mlir.dialects": {"llvm": None},
        "cutlass.cutlass_dsl": {"T": None, "dsl_user_op": lambda f: f},
    }
    for name, members in parts.items():
        stand_in = types.ModuleType(name)
        vars(stand_in).update(members)
        monkeypatch.setitem(sys.modules, name, stand_in)
    sys.modules["cutlass"].cute = sys.modules["cutlass.cute"]  # type: ignore[attr-defined]
    text = SOURCE.read_text()
    assert edit[0] in text
    module: dict[str, Any] = {"__name__": "cute_decode"}
    exec(compile(text.replace(*edit), SOURCE, "exec"), module)
    module["_run"] = interpreted
    return module["hook"]


def interpreted(ptx: str, operands: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """$0.. after the PTX, `count` words, with the operands behind them."""
    held: dict[str, Any] = {f"${count + i}": x.v for i, x in enumerate(operands)}

    def value(name: str) -> Any:
        return held[name] if name in held else np.uint32(int(name, 0))

    for line in ptx.strip("{} \n").split(";"):
        word, _, rest = line.strip().partition(" ")
        names = [n.strip() for n in re.findall(r"\{[^}]*\}|[^,{}]+", rest) if n.strip()]
        if not word or word == ".reg":
            continue
        to, *sources = names
        if word == "mov.b32" and to.startswith("{"):
            low, high = to.strip("{}").split(", ")
            held[low], held[high] = (
                x.copy() for x in np.moveaxis(halves(value(sources[0])), -1, 0)
            )
        elif word == "mov.b32" and not sources[0].startswith("{"):
            held[to] = value(sources[0])
        elif word == "mov.b32":
            pair = [held[n] for n in sources[0].strip("{}").split(", ")]
            held[to] = np.ascontiguousarray(np.stack(pair, -1)).view(np.uint32)[..., 0]
        else:
            held[to] = OPERATIONS[word](*map(value, sources))
    return tuple(Uint32(held[f"${i}"]) for i in range(count))


def halves(word: np.ndarray) -> np.ndarray:
    """Words [..] -> their 16-bit halves [.., 2]."""
    return np.ascontiguousarray(word)[..., None].view(np.uint16)


def rounded(kind: Any, f: Any, *words: np.ndarray) -> np.ndarray:
    """f of the halves of words as floats of a kind, rounded once."""
    wide = (halves(x).view(kind).astype(np.float64) for x in words)
    result = np.asarray(f(*wide)).astype(kind)
    return np.ascontiguousarray(result).view(np.uint32)[..., 0]


def fused(a: Any, b: Any, c: Any) -> Any:
    return a * b + c


def looked_up(a: Any, b: Any, c: Any, table: Any) -> Any:
    return {0xEA: a & b | c, 0x6A: (a & b) ^ c}[int(table)]


def permuted(a: Any, b: Any, selector: Any) -> Any:
    table = [x >> np.uint32(8 * i) & np.uint32(0xFF) for x in (a, b) for i in range(4)]
    table = np.stack(np.broadcast_arrays(selector, *table)[1:])
    word = np.zeros_like(selector)
    for i in range(4):
        chosen = selector >> np.uint32(4 * i) & np.uint32(0xF)
        assert (chosen < 8).all(), "bit 3 of a selector spreads signs"
        byte = np.take_along_axis(table, chosen[None].astype(np.int64), 0)[0]
        word = word | byte << np.uint32(8 * i)
    return word


OPERATIONS: dict[str, Any] = {
    "and.b32": np.bitwise_and,
    "shl.b32": np.left_shift,
    "shr.u32": np.right_shift,
    "add.u32": np.add,
    "shf.r.wrap.b32": lambda low, high, n: low >> n | high << np.uint32(32 - n),
    "lop3.b32": looked_up,
    "prmt.b32": permuted,
    "mul.bf16x2": partial(rounded, ml_dtypes.bfloat16, np.multiply),
    "mul.f16x2": partial(rounded, np.float16, np.multiply),
    "fma.rn.bf16x2": partial(rounded, ml_dtypes.bfloat16, fused),
    "fma.rn.f16x2": partial(rounded, np.float16, fused),
}


def decoded(hook: Any, activations: str, w: cutemoe.QuantizedTensor) -> torch.Tensor:
    """Values [G, N, K] of weights whose N and K are multiples of 64, by the kernel's lanes."""
    data, factor = layout.pack(w, compute=activations)
    made, (groups, n, k) = hook(w.format, activations, w.group_size), w.shape
    codes = data[..., : layout.CODE_BYTES].contiguous().view(torch.int32).numpy().view(np.uint32)
    scales = data[..., layout.CODE_BYTES :].contiguous().view(torch.int32).numpy().view(np.uint32)
    # warp, g, t, word, and warp, g, word
    codes = codes.reshape(groups, n // 64, k // 64, 4, 8, 4, 4)
    # a group of 128 has the scales of two warps in each of its units
    units = 2 if made.group == 128 and w.format == "int4" else 1
    scales = scales.reshape(groups, n // 64, k // 64 // units, 4, 8, made.words)
    scales = np.repeat(scales, units, 2)
    words = [Uint32(np.repeat(scales[..., None, i], 4, -1)) for i in range(made.words)]
    out = np.zeros((groups, n // 64, 64, k // 64, 64))
    each, kind = OPERANDS[activations]
    per = 32 // (8 * np.dtype(each).itemsize)
    # a fragment word has `per` neighbouring columns of lane t
    rows = out.reshape(groups, n // 64, 4, 2, 8, k // 64, 2, 8 // per, 4, per)
    sums = made.scales(words) if made.group else None
    for j, operands in enumerate(made.operands(words)):
        for h in range(2):
            for i, word in enumerate(made.decode(Uint32(codes[..., 2 * j + h]), operands[h], h)):
                value = np.ascontiguousarray(word.v)[..., None].view(each).view(kind)
                value = value.astype(np.float64)
                if sums is not None:
                    value = value * sums[j * len(sums) // 2][h].v.astype(np.float64)[..., None]
                # group, row block, column block, warp, g, t, number -> their places
                rows[:, :, :, h, :, :, j, i] = value.transpose(0, 1, 3, 4, 2, 5, 6)
    value = torch.from_numpy(out.reshape(groups, n, k)) * made.power
    return value if factor is None else value * factor.double()[:, None, None]


def weights(format: str, activations: str, group: int, seed: int = 0) -> cutemoe.QuantizedTensor:
    """Every code under every scale that the layout takes, in both row halves."""
    half = max(64, group)
    data, blocks = draw.random_bytes((2, 256, half), seed), 2 * half // group
    row = torch.arange(256)
    if format == "int4":
        # bf16 of every exponent that does not overflow, and any mantissa
        bits = (row % 240 + 8 << 7 | row * 37 % 128).to(torch.int16)
        scale = bits[None, :, None].expand(2, 256, blocks).contiguous().view(torch.bfloat16)
        return cutemoe.QuantizedTensor(data, scale, format=format, group_size=group)
    if format == "mxfp4":
        if activations == "fp8":
            # 11 octaves in 128 columns, from the lowest and to the highest byte
            low = torch.stack([row % 244, (row + 100) % 244])[:, :, None]
            scale = low + torch.tensor([0, 11, 4, 7])
        elif activations == "fp16":
            # 24 octaves, of which the first block has the lowest
            low = torch.stack([row % 24, 230 + row % 24])[:, :, None]
            scale = low + (torch.arange(blocks) > 0)
        else:
            # o = 0 takes 0..128 less the lowest, o > 0 the rest
            low = row % 129
            scale = torch.stack([low, low + 126])[:, :, None].expand(2, 256, blocks)
        return cutemoe.QuantizedTensor(data, scale.to(torch.uint8).contiguous(), format=format)
    # under a zero scale only zero codes are taken
    scale = (1 + row % 126)[None, :, None].expand(2, 256, blocks).to(torch.uint8).contiguous()
    over = torch.tensor([0.5, 2.0])
    return cutemoe.QuantizedTensor(data, scale.view(torch.float8_e4m3fn), over, format=format)


recipes = pytest.mark.parametrize(("format", "activations", "group"), RECIPES)


@recipes
def test_every_code_and_scale_is_exact(format, activations, group, monkeypatch):
    w = weights(format, activations, group)
    assert layout.refuse(w, compute=activations) is None
    got = decoded(decode(monkeypatch), activations, w)
    assert torch.equal(got, w.dequantize(torch.float64))


@pytest.mark.parametrize(
    "edit",
    [
        ("0x7F807F80", "0x7F007F80"),
        ("w, w, 8, kind", "w, w, 16, kind"),
        ('("lo", "hi")', '("hi", "lo")'),
        ("power = 128.0", "power = 64.0"),
        ("(5, 5, 6, 6)", "(5, 6, 5, 6)"),
        ("power = 512.0", "power = 1.0"),
        ("shf.r.wrap.b32 $1, $2, $2, 4", "shf.r.wrap.b32 $1, $2, $2, 12"),
        ("add.u32 $1, $1, t", "add.u32 $1, $1, 0"),
        ("0x0C080000", "0x0C080400"),
        ("(4 * j, 16 + 4 * j)", "(4 * j, 20 - 4 * j)"),
        ("shl.b32 u, $2, 4", "shl.b32 u, $2, 0"),
        ("(w & Uint32(0xFF00)) << 15", "(w & Uint32(0xFF00)) << 16"),
        ("(w << 16).bitcast", "w.bitcast"),
    ],
)
def test_a_planted_bug_shows(edit, monkeypatch):
    hook = decode(monkeypatch, edit)
    assert not all(same(hook, *recipe) for recipe in RECIPES)


def same(hook: Any, format: str, activations: str, group: int) -> bool:
    w = weights(format, activations, group, 1)
    # scales that differ from group to group: equal ones hide which is used
    bits = torch.int16 if format == "int4" else torch.uint8
    scale = w.scale.view(bits).clone()
    if activations == "bf16" or format != "mxfp4":
        scale[..., 1::2] = scale[..., 1::2].clamp(max=125) + 1
    w = cutemoe.QuantizedTensor(
        w.data, scale.view(w.scale.dtype), w.global_scale, format=format, group_size=group
    )
    return torch.equal(decoded(hook, activations, w), w.dequantize(torch.float64))


@recipes
def test_the_check_of_planted_bugs_passes_without_one(format, activations, group, monkeypatch):
    assert same(decode(monkeypatch), format, activations, group)
