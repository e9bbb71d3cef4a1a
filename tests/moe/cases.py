"""Layers for the MoE tests, and a token-by-token oracle that shares no code with the package.

The oracle decodes weights and quantises activations through the public formats only. `naive` with
float64 is the truth; with float32 it is the same-precision torch path of the tolerance rule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn import functional

import cutemoe
from tests import strategies as draw

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# weights, activations: what the Triton kernels take, then what only torch does
SUPPORTED = (
    ("bf16", "bf16"),
    ("fp16", "fp16"),
    ("mxfp4", "bf16"),
    ("mxfp4", "fp16"),
    ("mxfp4", "fp8"),
    ("nvfp4", "bf16"),
    ("nvfp4", "fp16"),
    ("nvfp4", "fp8"),
    ("nvfp4", "nvfp4"),
    ("int4", "bf16"),
    ("int4", "fp16"),
    ("int4", "fp8"),
)
TORCH_ONLY = (
    ("fp8", "bf16"),
    ("fp8", "fp8"),
    ("mxfp4", "nvfp4"),
    ("nvfp4", "mxfp4"),
    ("bf16", "fp8"),
)
# both operands of the kernels for SM120
FP4 = ("nvfp4", "mxfp4")
# 16-bit activations in those kernels; other back ends have their cases
W4A16 = pytest.param("nvfp4", "bf16", marks=pytest.mark.gpu)
COMBINATIONS = (*SUPPORTED, ("mxfp4", "mxfp4"), *TORCH_ONLY)


@dataclass(frozen=True)
class Target:
    """A back end on a device."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"

    def available(self) -> None:
        """Skips the test where the back end does not run on the device at all."""
        for r in cutemoe.backends("fused_moe", self.device):
            if r.name == self.backend and r.reason is not None:
                pytest.skip(r.reason)

    def put(self, t: Any) -> Any:
        """A tensor, or tuple of them, on the device."""
        if isinstance(t, tuple):
            return tuple(self.put(part) for part in t)
        return t.to(self.device) if isinstance(t, torch.Tensor) else t

    def willing(self, op: str, *args: Any, **kwargs: Any) -> None:
        """Skips the test where the back end refuses the call, with its reason."""
        for r in cutemoe.explain(op, *args, **kwargs).reasons:
            if r.name == self.backend and r.reason is not None:
                pytest.skip(r.reason)


@dataclass(frozen=True, eq=False)
class Layer:
    """The arguments of `prepare_moe`."""

    w13: Any
    w2: Any
    b13: Any = None
    b2: Any = None
    activations: str = "bf16"
    gate_up: str = "gate_up"
    input_scale: Any = None

    @property
    def experts(self) -> int:
        return self.w2.shape[0]

    @property
    def hidden(self) -> int:
        return self.w2.shape[1]

    @property
    def intermediate(self) -> int:
        return self.w2.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of x that goes with the activations."""
        return DTYPES.get(self.activations, torch.bfloat16)

    def prepared(self, target: Target | None = None, rows: bool = False) -> cutemoe.PreparedMoE:
        """The layer as the target's back end wants its weights, or in rows."""
        return cutemoe.prepare_moe(
            self.w13,
            self.w2,
            self.b13,
            self.b2,
            activations=self.activations,
            gate_up=self.gate_up,
            input_scale=self.input_scale,
            device=None if target is None else target.device,
            backend="reference" if rows or target is None else target.backend,
        )


def targets(*gpu: str) -> list[Any]:
    """Parameters of a fixture: what runs on a CPU, and these back ends on a GPU."""
    here = [Target("reference", "cpu"), Target("triton", "cpu")]
    return here + [pytest.param(Target(n, "cuda"), marks=pytest.mark.gpu) for n in gpu]


def is_gated(activation: Any) -> bool:
    return not isinstance(activation, cutemoe.ReLU2)


def exact_weight(format: str, shape: tuple[int, ...], seed: int) -> Any:
    """Weights of magnitude at most 8 whose values are multiples of 1/4."""
    if format in DTYPES:
        return draw.integers(shape, seed, 4, DTYPES[format])
    if format == "fp8":
        data = draw.integers(shape, seed, 4, torch.float32).to(torch.float8_e4m3fn)
        scale = draw.powers_of_two(shape[:-1], seed + 1, -1, 0)
        return cutemoe.QuantizedTensor(data, scale, format="fp8")
    group = {"mxfp4": 32, "nvfp4": 16, "int4": 32}[format]
    scale = draw.powers_of_two((*shape[:-1], shape[-1] // group), seed + 1, -1, 0)
    if format == "mxfp4":
        stored = (127 + torch.log2(scale)).to(torch.uint8)
    else:
        stored = scale.to(torch.bfloat16 if format == "int4" else torch.float8_e4m3fn)
    data = draw.random_bytes((*shape[:-1], shape[-1] // 2), seed)
    over = draw.powers_of_two(shape[:1], seed + 2, -1, 0) if format == "nvfp4" else None
    return cutemoe.QuantizedTensor(data, stored, over, format=format)


# exponents of static scales, FC1 and FC2: the lower ones saturate, and so tell experts apart
STATIC = {"fp8": ((-11, 0), (-5, 1)), "nvfp4": ((-13, -9), (-9, -5))}


def exact_layer(
    format: str,
    activations: str = "bf16",
    *,
    gated: bool = True,
    gate_up: str = "gate_up",
    biases: bool = True,
    E: int = 5,
    H: int = 64,
    I: int = 96,  # noqa: E741
    seed: int = 0,
) -> Layer:
    """A layer that is exact on `exact_x` with `EXACT` activations: static scales, biases n / 4."""
    scale = None
    if activations in STATIC:
        scale = tuple(
            draw.powers_of_two((E,), seed + i, *ends)
            for i, ends in zip((6, 7), STATIC[activations], strict=True)
        )
    n13 = 2 * I if gated else I
    return Layer(
        exact_weight(format, (E, n13, H), seed),
        exact_weight(format, (E, H, I), seed + 3),
        draw.integers((E, n13), seed + 4, 8, torch.float32) / 4 if biases else None,
        draw.integers((E, H), seed + 5, 8, torch.float32) / 4 if biases else None,
        activations,
        gate_up,
        scale,
    )


def exact_x(T: int, layer: Layer, seed: int) -> torch.Tensor:
    """[T, H] of -1, 0 and 1, two of them not zero in every row."""
    at = torch.rand(T, layer.hidden, generator=draw.generator(seed)).topk(2, dim=1).indices
    sign = draw.integers((T, 2), seed + 1, 1, torch.float32)
    return torch.zeros(T, layer.hidden).scatter(1, at, sign).to(layer.dtype)


# sigmoid(4096 * n / 4) is 0, 1/2 or 1 in every precision, so these round nothing on exact layers
SATURATED = cutemoe.SwiGLU(alpha=4096.0, beta=1.0, limit=7.0)
EXACT = (SATURATED, cutemoe.SwiGLU(alpha=4096.0), cutemoe.ReLU2())


def random_layer(
    format: str,
    activations: str = "bf16",
    *,
    gated: bool = True,
    gate_up: str = "gate_up",
    biases: bool = True,
    input_scale: Any = None,
    E: int = 5,
    H: int = 64,
    I: int = 96,  # noqa: E741
    seed: int = 0,
) -> Layer:
    """Normal weights of unit gain."""
    n13 = 2 * I if gated else I

    def weight(shape: tuple[int, ...], seed: int) -> Any:
        w = draw.normal(shape, seed, scale=shape[-1] ** -0.5)
        if format in DTYPES:
            return w.to(DTYPES[format])
        return cutemoe.quantize(w, format, group_size=32 if format == "int4" else None)

    if activations == "nvfp4" and input_scale is None:
        # multipliers that use the range of e4m3 block scales, one for each expert
        input_scale = (0.005 + 0.001 * torch.arange(E), 0.01 + 0.001 * torch.arange(E))
    return Layer(
        weight((E, n13, H), seed),
        weight((E, H, I), seed + 1),
        draw.normal((E, n13), seed + 2) if biases else None,
        draw.normal((E, H), seed + 3) if biases else None,
        activations,
        gate_up,
        input_scale,
    )


def values(w: Any, dtype: torch.dtype) -> torch.Tensor:
    """Decoded weights."""
    return w.to(dtype) if isinstance(w, torch.Tensor) else w.dequantize(dtype)


def lowest_bit(t: torch.Tensor) -> float:
    """The greatest power of two that divides every value; float64 without values that are not 0."""
    t = t.double().flatten()
    m, e = torch.frexp(t[t != 0])
    if not len(m):
        return 1.0
    n = torch.ldexp(m, torch.tensor(53)).long()
    low = (n & -n).double()
    return float(torch.ldexp(low, e - 53).min())


def assert_order_free(a: torch.Tensor, b: torch.Tensor, bits: int = 24) -> None:
    """Every partial sum of a [K] times b [N, K] is a number of that many bits, in any order."""
    most = float((b.double().abs() @ a.double().abs()).max())
    assert most < 2**bits * lowest_bit(a) * lowest_bit(b), "the case is not exact"


def operand(
    a: torch.Tensor, layer: Layer, which: int, expert: int, dtype: torch.dtype
) -> torch.Tensor:
    """A row [K] as the GEMM reads it."""
    if layer.activations in DTYPES:
        return a.to(DTYPES[layer.activations]).to(dtype)
    a = a.to(torch.float32)
    given = layer.input_scale
    if isinstance(given, tuple):
        given = given[which]
    s = None if given is None else torch.as_tensor(given, dtype=torch.float32).expand(layer.experts)
    if layer.activations == "mxfp4":
        return cutemoe.quantize(a, "mxfp4").dequantize(dtype)
    if layer.activations == "nvfp4":
        d = 1.0 if s is None else s[expert]
        return cutemoe.quantize(a, "nvfp4", global_scale=d).dequantize(dtype)
    if s is None:
        return cutemoe.quantize(a, "fp8").dequantize(dtype)
    return (a / s[expert]).clamp(-448, 448).to(torch.float8_e4m3fn).to(dtype) * s[expert].to(dtype)


def activate(h: torch.Tensor, layer: Layer, activation: Any, expert: int) -> torch.Tensor:
    """[2I] or [I] -> [I] by the formulas of the documentation."""
    if isinstance(activation, cutemoe.ReLU2):
        return h.clamp(min=0) ** 2
    n = layer.intermediate
    gate, up = {
        "gate_up": (h[:n], h[n:]),
        "up_gate": (h[n:], h[:n]),
        "interleaved": (h[0::2], h[1::2]),
    }[layer.gate_up]
    if isinstance(activation, cutemoe.GeGLU):
        return functional.gelu(gate, approximate=activation.approximate) * up
    alpha, beta, limit = (
        p[expert].to(h.dtype) if isinstance(p, torch.Tensor) else p
        for p in (activation.alpha, activation.beta, activation.limit)
    )
    if limit is not None:
        gate, up = torch.clamp(gate, max=limit), torch.clamp(up, -limit, limit)
    return gate / (1 + torch.exp(-alpha * gate)) * (up + beta)


def naive(
    layer: Layer,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    activation: Any,
    *,
    offset: int = 0,
    dtype: torch.dtype = torch.float64,
    round_mid: bool = True,
    exact: bool = False,
) -> torch.Tensor:
    """The layer one token and one slot at a time; [T, H] in dtype.

    Args:
        round_mid: quantise the FC1 activation; without, the error of that step shows.
        exact: assert that no sum depends on its order.
    """
    w13, w2 = values(layer.w13, dtype), values(layer.w2, dtype)
    check: Callable[..., None] = assert_order_free if exact else lambda *_: None
    out = torch.zeros(x.shape, dtype=dtype)
    for t in range(x.shape[0]):
        for k in range(ids.shape[1]):
            e = int(ids[t, k]) - offset
            if not 0 <= e < layer.experts:
                continue
            a = operand(x[t], layer, 0, e, dtype)
            check(a, w13[e])
            h = w13[e] @ a
            if layer.b13 is not None:
                h = h + layer.b13[e].to(dtype)
            mid = activate(h, layer, activation, e)
            mid = operand(mid, layer, 1, e, dtype) if round_mid else mid
            check(mid, w2[e])
            y = w2[e] @ mid
            if layer.b2 is not None:
                y = y + layer.b2[e].to(dtype)
            out[t] += weights[t, k].to(dtype) * y
    return out


def call(
    target: Target,
    layer: Layer,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    rows: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """`fused_moe` on the target, skipped where the back end refuses; the result on the CPU."""
    args = (target.put(x), layer.prepared(target, rows), target.put(ids), target.put(weights))
    activation = kwargs.get("activation")
    if isinstance(activation, cutemoe.SwiGLU):
        moved = (target.put(p) for p in (activation.alpha, activation.beta, activation.limit))
        kwargs["activation"] = cutemoe.SwiGLU(*moved)
    target.willing("fused_moe", *args, **kwargs)
    return cutemoe.fused_moe(*args, backend=target.backend, **kwargs).cpu()
