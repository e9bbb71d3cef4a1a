"""What the Hopper kernel makes of packed words, every scale and every code, without a GPU.

The module's own source runs on arrays of lanes; its PTX is interpreted instruction by instruction.
"""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import cutemoe
from cutemoe.layouts import sm90_rs_w4 as layout
from tests import strategies as draw
from tests.dsl.lanes import Uint32

SOURCE = Path(layout.__file__).parents[1] / "gemm" / "cute_decode.py"


def decode(monkeypatch: pytest.MonkeyPatch, edit: tuple[str, str] = ("", "")) -> dict[str, Any]:
    """HOOKS of the module, executed with stand-ins for the DSL; `edit` plants a bug."""
    arch = types.SimpleNamespace(shf=lambda a, b, n, kind: a << n | b >> 32 - n)
    parts = {
        "cutlass": {"Uint32": Uint32},
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
    return module["HOOKS"]


def interpreted(ptx: str, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """$0..$3 after the PTX, with $4.. the operands."""
    held: dict[str, Any] = {f"${4 + i}": x.v for i, x in enumerate(operands)}

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
        elif word == "mov.b32":
            pair = [held[n] for n in sources[0].strip("{}").split(", ")]
            held[to] = np.ascontiguousarray(np.stack(pair, -1)).view(np.uint32)[..., 0]
        else:
            held[to] = OPERATIONS[word](*map(value, sources))
    return tuple(Uint32(held[f"${i}"]) for i in range(4))


def halves(word: np.ndarray) -> np.ndarray:
    """Words [..] -> their 16-bit halves [.., 2]."""
    return np.ascontiguousarray(word)[..., None].view(np.uint16)


def multiplied(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    wide = (halves(x).view(ml_dtypes.bfloat16).astype(np.float64) for x in (a, b))
    product = np.multiply(*wide).astype(ml_dtypes.bfloat16)
    return np.ascontiguousarray(product).view(np.uint32)[..., 0]


def majority(a: Any, b: Any, c: Any, table: Any) -> Any:
    assert int(table) == 0xEA
    return a & b | c


OPERATIONS: dict[str, Any] = {
    "and.b32": np.bitwise_and,
    "shl.b32": np.left_shift,
    "shf.r.wrap.b32": lambda low, high, n: low >> n | high << np.uint32(32 - n),
    "lop3.b32": majority,
    "mul.bf16x2": multiplied,
}


def decoded(hooks: dict[str, Any], w: cutemoe.QuantizedTensor) -> torch.Tensor:
    """Values [G, N, K] of weights whose N and K are multiples of 64, by the kernel's lanes."""
    data, factor = layout.pack(w)
    hook, (groups, n, k) = hooks[w.format], w.shape
    codes = data[..., : layout.CODE_BYTES].contiguous().view(torch.int32).numpy().view(np.uint32)
    scales = data[..., layout.CODE_BYTES :].contiguous().view(torch.int32).numpy().view(np.uint32)
    # warp, g, t, word, and warp, g, word
    codes = codes.reshape(groups, n // 64, k // 64, 4, 8, 4, 4)
    scales = scales.reshape(groups, n // 64, k // 64, 4, 8, hook.words)
    words = [Uint32(np.repeat(scales[..., None, i], 4, -1)) for i in range(hook.words)]
    out = np.zeros((groups, n // 64, 64, k // 64, 64))
    rows = out.reshape(groups, n // 64, 4, 2, 8, k // 64, 2, 4, 4, 2)
    for j, scale in enumerate(hook.multipliers(words)):
        for h in range(2):
            pairs = hook.pairs(Uint32(codes[..., 2 * j + h]), scale, h)
            for i, pair in enumerate(pairs):
                value = halves(pair.v).view(ml_dtypes.bfloat16).astype(np.float64)
                # group, row block, column block, warp, g, t, half -> the place of 8 i + 2 t + half
                rows[:, :, :, h, :, :, j, i] = value.transpose(0, 1, 3, 4, 2, 5, 6)
    value = torch.from_numpy(out.reshape(groups, n, k)) * hook.power
    return value if factor is None else value * factor.double()[:, None, None]


def weights(format: str, seed: int = 0) -> cutemoe.QuantizedTensor:
    """Every code under every scale that the layout takes, in both row halves."""
    data = draw.random_bytes((2, 256, 64), seed)
    if format == "mxfp4":
        # o = 0 takes 0..128 less the lowest, o > 0 the rest
        low = torch.arange(256) % 129
        scale = torch.stack([low, low + 126])[:, :, None].expand(2, 256, 4).to(torch.uint8)
        return cutemoe.QuantizedTensor(data, scale.contiguous(), format=format)
    # under a zero scale only zero codes are taken
    byte = 1 + torch.arange(256) % 126
    scale = byte[None, :, None].expand(2, 256, 8).to(torch.uint8).contiguous()
    over = torch.tensor([0.5, 2.0])
    return cutemoe.QuantizedTensor(data, scale.view(torch.float8_e4m3fn), over, format=format)


@pytest.mark.parametrize("format", layout.SCALE_BYTES)
def test_every_code_and_scale_is_exact(format, monkeypatch):
    w = weights(format)
    assert layout.refuse(w) is None
    got = decoded(decode(monkeypatch), w)
    assert torch.equal(got, w.dequantize(torch.float64))


@pytest.mark.parametrize(
    "edit",
    [
        ("0x7F807F80", "0x7F007F80"),
        ("w, w, 8, kind", "w, w, 16, kind"),
        ('("lo", "hi")', '("hi", "lo")'),
        ("power = 128.0", "power = 64.0"),
        ("(5, 5, 6, 6)", "(5, 6, 5, 6)"),
    ],
)
def test_a_planted_bug_shows(edit, monkeypatch):
    hooks = decode(monkeypatch, edit)
    wrong = [f for f in hooks if not same(hooks, f)]
    assert wrong


def same(hooks: dict[str, Any], format: str) -> bool:
    w = weights(format, 1)
    # scales that differ from group to group: equal ones hide which is used
    scale = w.scale.view(torch.uint8).clone()
    scale[..., 1::2] = scale[..., 1::2].clamp(max=125) + 1
    w = cutemoe.QuantizedTensor(w.data, scale.view(w.scale.dtype), w.global_scale, format=format)
    return torch.equal(decoded(hooks, w), w.dequantize(torch.float64))


@pytest.mark.parametrize("format", layout.SCALE_BYTES)
def test_the_check_of_planted_bugs_passes_without_one(format, monkeypatch):
    assert same(decode(monkeypatch), format)
