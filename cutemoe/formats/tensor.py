"""QuantizedTensor: codes and scales that belong together, validated once, and `quantize`.

Decision: a frozen dataclass. Rejected: a torch.Tensor subclass (its operators would silently
dequantise), and inferring the format from dtypes (mxfp4, nvfp4 and int4 all store uint8).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cutemoe.errors import InvalidCall, invalid
from cutemoe.formats.format import Format, grouped
from cutemoe.formats.fp8 import FP8
from cutemoe.formats.int4 import INT4
from cutemoe.formats.mxfp4 import MXFP4
from cutemoe.formats.nvfp4 import NVFP4

FORMATS: dict[str, Format] = {f.name: f for f in (MXFP4, NVFP4, INT4, FP8)}


def find_format(name: object, argument: str = "format") -> Format:
    """The format of that name, or InvalidCall with the names that exist."""
    if not isinstance(name, str) or name not in FORMATS:
        raise invalid(argument, "one of " + ", ".join(map(repr, FORMATS)), repr(name))
    return FORMATS[name]


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Codes, block scales and an optional global scale of one tensor.

    value = code * scale * global_scale, scales constant over `group_size` neighbours of the last
    dimension (fp8: over whole rows, or the tensor).

    Args:
        data: uint8 [..., K/2], the low nibble is the even index; fp8: float8_e4m3fn [..., K].
        scale: mxfp4 uint8 (e8m0) [..., K/32]; nvfp4 float8_e4m3fn, or its bytes, [..., K/16];
            int4 bfloat16 [..., K/group_size]; fp8 float32, [] or the leading dimensions.
        global_scale: nvfp4 only: float32, [] or the first leading dimensions ([E] for [E, N, K]).
            None means 1.
        format: "mxfp4", "nvfp4", "int4" or "fp8".
        group_size: values per scale; by default what the shapes of data and scale say.

    Raises:
        InvalidCall: dtypes, shapes or devices that do not belong together.
    """

    data: torch.Tensor
    scale: torch.Tensor
    global_scale: torch.Tensor | None = None
    format: str = ""
    group_size: int | None = None

    def __init__(
        self,
        data: torch.Tensor,
        scale: torch.Tensor,
        global_scale: torch.Tensor | None = None,
        *,
        format: str,
        group_size: int | None = None,
    ) -> None:
        f = find_format(format)
        for name, t in (("data", data), ("scale", scale)):
            if not isinstance(t, torch.Tensor):
                raise invalid(name, "a torch.Tensor", type(t).__name__)
        if data.dtype != f.data_dtype:
            raise invalid("data", f"{f.data_dtype} for {f.name}", data.dtype)
        if data.ndim == 0:
            raise invalid("data", "at least one dimension", "a scalar")
        scale = _checked_scale(scale, data, f)
        group_size = _checked_group(f, data, scale, group_size)
        global_scale = _checked_global(f, data, global_scale)
        for name, value in (
            ("data", data),
            ("scale", scale),
            ("global_scale", global_scale),
            ("format", f.name),
            ("group_size", group_size),
        ):
            object.__setattr__(self, name, value)

    @property
    def shape(self) -> torch.Size:
        """Shape of the dequantized tensor."""
        return torch.Size(
            (*self.data.shape[:-1], self.data.shape[-1] * self._format.codes_per_byte)
        )

    @property
    def ndim(self) -> int:
        """Number of dimensions of the dequantized tensor."""
        return self.data.ndim

    @property
    def device(self) -> torch.device:
        """Device of the codes and scales."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        parts = (self.data, self.scale, self.global_scale)
        return sum(t.nbytes for t in parts if t is not None)

    @property
    def _format(self) -> Format:
        return FORMATS[self.format]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values [..., K], computed in float32 (float64 if asked) and rounded once to dtype."""
        f = self._format
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        value = f.decode(self.data).to(wide)
        scale = f.decode_scale(self.scale).to(wide)
        if self.group_size is None:
            value = value * _right_expand(scale, value.ndim)
        else:
            value = (grouped(value, self.group_size) * scale[..., None]).flatten(-2)
        if self.global_scale is not None:
            value = value * _right_expand(self.global_scale.to(wide), value.ndim)
        return value.to(dtype)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same values on another device."""
        g = None if self.global_scale is None else self.global_scale.to(device)
        return self._with(self.data.to(device), self.scale.to(device), g)

    def __getitem__(self, index: Any) -> QuantizedTensor:
        """Indexes the first dimension, as a tensor of rank two or more would."""
        if self.ndim < 2:
            raise InvalidCall("index: expected a tensor with leading dimensions, got rank 1")
        g = self.global_scale
        scale = self.scale[index] if self.scale.ndim else self.scale
        return self._with(self.data[index], scale, g[index] if g is not None and g.ndim else g)

    def _with(
        self, data: torch.Tensor, scale: torch.Tensor, global_scale: torch.Tensor | None
    ) -> QuantizedTensor:
        return QuantizedTensor(
            data, scale, global_scale, format=self.format, group_size=self.group_size
        )

    def __repr__(self) -> str:
        group = "" if self.group_size is None else f", group_size={self.group_size}"
        return f"QuantizedTensor({self.format}, {list(self.shape)}{group}, device={self.device})"


def quantize(
    x: torch.Tensor,
    format: str,
    *,
    group_size: int | None = None,
    global_scale: torch.Tensor | float | None = None,
) -> QuantizedTensor:
    """Quantizes the last dimension of x [..., K] to a format, with IEEE float32 operations only.

    Args:
        x: floating point, any leading dimensions, K a multiple of the group size.
        format: "mxfp4" (groups of 32), "nvfp4" (16), "int4" (128, 64 or 32), "fp8" (rows).
        group_size: int4's choice; the others have one.
        global_scale: nvfp4's multiplier, scalar or one for each first leading index; by default
            amax / (448 * 6) of the whole tensor.

    Returns:
        QuantizedTensor of the shape of x. A block with a NaN or an infinity dequantises to NaN.

    Raises:
        InvalidCall: not a floating tensor, unknown format, or K not a multiple of the group.
    """
    if not isinstance(x, torch.Tensor):
        raise invalid("x", "a torch.Tensor", type(x).__name__)
    if not x.dtype.is_floating_point or x.ndim == 0:
        raise invalid(
            "x", "a floating point tensor of rank 1 or more", f"{x.dtype} {list(x.shape)}"
        )
    f = find_format(format)
    group = _group_of(f, group_size)
    k = x.shape[-1]
    if k == 0 or k % (group or 1):
        raise invalid("x", f"a last dimension that is a positive multiple of {group or 1}", k)
    if global_scale is not None:
        if not isinstance(global_scale, torch.Tensor):
            global_scale = torch.tensor(global_scale, dtype=torch.float32, device=x.device)
        global_scale = _checked_global(f, x, global_scale)
    data, scale, global_scale = f.encode(x.detach().to(torch.float32), group, global_scale)
    return QuantizedTensor(data, scale, global_scale, format=f.name, group_size=group)


def broken_scales(q: QuantizedTensor) -> str | None:
    """What is wrong with the scales of q, or None. Reads the values: synchronises on a GPU."""
    s = q._format.decode_scale(q.scale)
    parts = [("scale", s)] + ([] if q.global_scale is None else [("global_scale", q.global_scale)])
    for name, t in parts:
        if torch.isnan(t).any():
            return f"NaN in {name}"
        if torch.isinf(t).any():
            return f"infinity in {name}"
        if torch.signbit(t).any():
            return f"negative {name}"
    return None


def _right_expand(scale: torch.Tensor, ndim: int) -> torch.Tensor:
    return scale.reshape(scale.shape + (1,) * (ndim - scale.ndim))


def _group_of(f: Format, group_size: int | None) -> int | None:
    if group_size is None:
        return f.group_sizes[0] if f.group_sizes else None
    if group_size not in f.group_sizes:
        raise invalid("group_size", f"one of {f.group_sizes} for {f.name}", group_size)
    return group_size


def _checked_scale(scale: torch.Tensor, data: torch.Tensor, f: Format) -> torch.Tensor:
    if f.scale_dtype == torch.float8_e4m3fn and scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e4m3fn)
    if scale.dtype != f.scale_dtype:
        raise invalid("scale", f"{f.scale_dtype} for {f.name}", scale.dtype)
    if scale.device != data.device:
        raise invalid("scale", f"the device of data, {data.device}", scale.device)
    return scale


def _checked_group(
    f: Format, data: torch.Tensor, scale: torch.Tensor, group_size: int | None
) -> int | None:
    k = data.shape[-1] * f.codes_per_byte
    if not f.group_sizes:
        if group_size is not None:
            raise invalid("group_size", f"None for {f.name}", group_size)
        if scale.shape != data.shape[: scale.ndim] or scale.ndim >= data.ndim:
            raise invalid(
                "scale", f"[] or the leading dimensions of {list(data.shape)}", list(scale.shape)
            )
        return None
    if scale.ndim != data.ndim or scale.shape[:-1] != data.shape[:-1]:
        raise invalid("scale", f"leading dimensions {list(data.shape[:-1])}", list(scale.shape))
    if group_size is None:
        group_size = k // scale.shape[-1] if scale.shape[-1] else 0
    if group_size not in f.group_sizes:
        raise invalid("group_size", f"one of {f.group_sizes} for {f.name}", group_size)
    if k == 0 or scale.shape[-1] * group_size != k:
        want = f"{k} / {group_size} values in the last dimension"
        raise invalid("scale", want, f"{scale.shape[-1]}")
    return group_size


def _checked_global(
    f: Format, data: torch.Tensor, global_scale: torch.Tensor | None
) -> torch.Tensor | None:
    if global_scale is None:
        return None
    if not f.has_global:
        raise invalid("global_scale", f"None for {f.name}", "a scale")
    if not isinstance(global_scale, torch.Tensor):
        raise invalid("global_scale", "a torch.Tensor", type(global_scale).__name__)
    if global_scale.dtype != torch.float32 or global_scale.device != data.device:
        want = f"float32 on {data.device}"
        raise invalid("global_scale", want, f"{global_scale.dtype} on {global_scale.device}")
    lead = data.shape[: max(global_scale.ndim, 0)]
    if global_scale.numel() == 1:
        return global_scale.reshape(())
    if global_scale.ndim >= data.ndim or global_scale.shape != lead:
        want = f"[] or the first leading dimensions of {list(data.shape)}"
        raise invalid("global_scale", want, list(global_scale.shape))
    return global_scale
