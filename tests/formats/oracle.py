"""An independent quantiser: numpy float32 and ml_dtypes, nothing of the package."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch

GROUPS = {"mxfp4": (32,), "nvfp4": (16,), "int4": (128, 64, 32), "fp8": (0,)}
E2M1, E4M3 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn
F32 = np.float32


def every_bfloat16() -> torch.Tensor:
    """All 65536 values, NaN and infinities among them; bfloat16."""
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


def every_float16() -> torch.Tensor:
    """All 65536 values; float16."""
    return torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)


def e2m1_codes(x: np.ndarray) -> np.ndarray:
    """uint8 codes of float32 values; NaN gives a zero of its sign."""
    sign = np.signbit(x).astype(np.uint8) << 3
    magnitude = np.minimum(np.nan_to_num(np.abs(x), nan=0.0, posinf=6.0), F32(6))
    return magnitude.astype(E2M1).view(np.uint8) | sign


def quantized(
    x: torch.Tensor, format: str, group: int, global_scale: np.float32 | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """x [R, K] -> codes uint8 [R, K] and the bytes of the scales, uint8 or uint16 or uint32."""
    values = x.float().numpy()
    with np.errstate(all="ignore"):
        if format == "fp8":
            return _fp8(values)
        blocks = values.reshape(len(values), -1, group)
        amax = np.abs(blocks).max(-1)
        finite = np.isfinite(amax)
        encode = {"mxfp4": _mxfp4, "nvfp4": _nvfp4, "int4": _int4}[format]
        codes, scale = encode(blocks, np.where(finite, amax, F32(0)), finite, global_scale)
        codes = np.where(finite[..., None], codes, 0).astype(np.uint8)
        return codes.reshape(values.shape), scale


def _mxfp4(blocks, amax, finite, _):
    exponent = np.frexp(amax.astype(np.float64))[1] - 1  # floor(log2), exact
    shared = np.where(amax == 0, -127, np.maximum(exponent - 2, -127))
    scaled = blocks / np.ldexp(np.float64(1), shared)[..., None]
    byte = np.where(finite, shared + 127, 255).astype(np.uint8)
    return e2m1_codes(np.where(finite[..., None], scaled, 0)), byte


def _nvfp4(blocks, amax, finite, d):
    g = F32(1) / (F32(1) if d is None else F32(d))
    s = np.minimum(amax * (g * F32(1 / 6)), F32(448)).astype(E4M3)
    s = np.where(finite, s, np.array(np.nan, E4M3))
    wide = s.astype(F32)
    codes = e2m1_codes(blocks * (g / wide)[..., None])
    return np.where((wide > 0)[..., None], codes, 0), s.view(np.uint8)


def _int4(blocks, amax, finite, _):
    s = (amax / F32(7)).astype(ml_dtypes.bfloat16)
    s = np.where(finite, s, np.array(np.nan, ml_dtypes.bfloat16))
    wide = s.astype(F32)[..., None]
    q = np.where(wide > 0, np.rint(blocks / wide), 0)
    return np.clip(q, -8, 7).astype(np.int8).view(np.uint8) & 15, s.view(np.uint16)


def _fp8(values):
    s = np.abs(values).max(-1) / F32(448)
    s = np.where(s == 0, F32(1), s)
    y = np.clip(values / s[:, None], F32(-448), F32(448))
    y = np.where(np.isfinite(values), y, F32(np.nan))
    return y.astype(E4M3).view(np.uint8), s.view(np.uint32)


def default_global(x: torch.Tensor) -> np.float32:
    """amax / 2688 in float32, at least 2^-118; 1 for zeros."""
    values = np.abs(x.float().numpy())
    values = values[np.isfinite(values)]
    amax = values.max() if values.size else F32(0)
    return max(F32(amax) / F32(2688), F32(2.0**-118)) if amax > 0 else F32(1)


def code_values(format: str) -> np.ndarray:
    """float64 value of every code."""
    if format == "int4":
        return (np.arange(16) ^ 8).astype(np.float64) - 8
    if format == "fp8":
        return np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float64)
    return np.arange(16, dtype=np.uint8).view(E2M1).astype(np.float64)


def scale_values(format: str, scale: np.ndarray) -> np.ndarray:
    """float64 value of scale bytes."""
    kind = {
        "mxfp4": ml_dtypes.float8_e8m0fnu,
        "nvfp4": E4M3,
        "int4": ml_dtypes.bfloat16,
        "fp8": np.float32,
    }[format]
    with np.errstate(invalid="ignore"):
        return scale.view(kind).astype(np.float64)


def codes_of(q) -> np.ndarray:
    """uint8 codes [..., K] of a QuantizedTensor."""
    data = q.data.view(torch.uint8).numpy()
    if q.format == "fp8":
        return data
    return np.stack((data & 15, data >> 4), -1).reshape(*data.shape[:-1], 2 * data.shape[-1])


def scale_bytes(q) -> np.ndarray:
    """The scales of a QuantizedTensor as unsigned integers."""
    kind = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[q.scale.element_size()]
    return q.scale.contiguous().view(kind).numpy()
