"""QuantizedTensor: codes and scales that belong together, validated once, and `quantize`.

Decision: a frozen dataclass. Rejected: a torch.Tensor subclass (its operators would silently
dequantise), and inferring the format from dtypes (mxfp4, nvfp4 and int4 all store uint8).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from cutemoe.errors import InvalidCall, invalid
from cutemoe.formats.format import Format, row_chunks
from cutemoe.formats.fp8 import FP8
from cutemoe.formats.int4 import INT4
from cutemoe.formats.mxfp4 import MXFP4
from cutemoe.formats.nvfp4 import GLOBAL_MIN, NVFP4

_VALUE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

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
            int4 bfloat16 [..., K/group_size]; fp8 float32, [] or the first leading dimensions
            ([E, N] or [E] for [E, N, K]).
        global_scale: nvfp4 only: float32, [] or the first leading dimensions. None means 1.
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
        """The values [..., K], computed in float32 (float64 if asked) and rounded once to dtype.

        Raises:
            InvalidCall: dtype is not float16, bfloat16, float32 or float64.
        """
        if dtype not in _VALUE_DTYPES:
            raise invalid("dtype", "float16, bfloat16, float32 or float64", dtype)
        f, lead, k = self._format, self.shape[:-1], self.shape[-1]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        rows = prod(lead)
        group = self.group_size or k
        data = self.data.reshape(rows, self.data.shape[-1])
        scale = self.scale if self.group_size else _for_rows(self.scale, lead)
        scale = scale.reshape(rows, k // group)
        factor = None if self.global_scale is None else _for_rows(self.global_scale, lead)
        out = torch.empty((rows, k), dtype=dtype, device=self.device)
        for part in row_chunks(rows, k, self.device):
            value = f.decode(data[part]).to(wide)
            blocks = value.view(value.shape[0], k // group, group)
            blocks.mul_(f.decode_scale(scale[part]).to(wide)[..., None])
            if factor is not None:
                value.mul_(factor[part, None].to(wide))
            out[part] = value
        return out.view(self.shape)

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same values on another device."""
        g = None if self.global_scale is None else self.global_scale.to(device)
        return self._with(self.data.to(device), self.scale.to(device), g)

    def __getitem__(self, index: Any) -> QuantizedTensor:
        """Indexes the first dimension with an integer, a slice, a mask or a tensor of indices."""
        if self.ndim < 2:
            raise InvalidCall("index: expected a tensor with leading dimensions, got rank 1")
        if not isinstance(index, (int, slice, list, torch.Tensor)):
            want = "an int, a slice, a list or a tensor, for the first dimension"
            raise invalid("index", want, repr(index))
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
        global_scale: nvfp4's multiplier, at least 2^-118: a number, or float32 [] or the first
            leading dimensions; by default amax / (448 * 6) of the whole tensor.

    Returns:
        QuantizedTensor of the shape of x. A block with a NaN or an infinity dequantises to NaN.

    Raises:
        InvalidCall: not a floating tensor, unknown format, K not a multiple of the group, or a
            global scale that does not fit.
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
    g = _given_global(f, x, global_scale)
    if g is None and f.default_global is not None:
        g = f.default_global(x.detach())
    lead = x.shape[:-1]
    flat = x.detach().reshape(prod(lead), k)
    factor = None if g is None else _for_rows(g, lead)
    parts = [
        f.encode(flat[p].to(torch.float32), group, None if factor is None else factor[p])
        for p in row_chunks(flat.shape[0], k, x.device)
    ]
    data, scale = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return QuantizedTensor(
        data.view((*lead, data.shape[-1])),
        scale.view((*lead, *scale.shape[1:])),
        g,
        format=f.name,
        group_size=group,
    )


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


def _for_rows(t: torch.Tensor, lead: torch.Size) -> torch.Tensor:
    """[] or the first leading dimensions -> one value a row, [R]."""
    return t.reshape(t.shape + (1,) * (len(lead) - t.ndim)).expand(lead).reshape(prod(lead))


def _given_global(
    f: Format, x: torch.Tensor, global_scale: torch.Tensor | float | None
) -> torch.Tensor | None:
    if isinstance(global_scale, (int, float)) and f.has_global:
        most = torch.finfo(torch.float32).max
        if not GLOBAL_MIN <= global_scale <= most:
            raise invalid("global_scale", f"from 2^-118 to {most:.3g}", global_scale)
        return torch.full((), global_scale, dtype=torch.float32, device=x.device)
    return _checked_global(f, x, global_scale)


def _group_of(f: Format, group_size: int | None) -> int | None:
    if group_size is None:
        return f.group_sizes[0] if f.group_sizes else None
    return _known_group(f, group_size)


def _known_group(f: Format, group_size: object) -> int:
    if isinstance(group_size, int) and group_size in f.group_sizes:
        return group_size
    want = f"one of {f.group_sizes} for {f.name}" if f.group_sizes else f"None for {f.name}"
    raise invalid("group_size", want, repr(group_size))


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
    if k == 0:
        raise invalid("data", "a last dimension that is not empty", list(data.shape))
    if not f.group_sizes:
        if group_size is not None:
            _known_group(f, group_size)
        if scale.shape != data.shape[: scale.ndim] or scale.ndim >= data.ndim:
            raise invalid(
                "scale", f"[] or the leading dimensions of {list(data.shape)}", list(scale.shape)
            )
        return None
    if scale.ndim != data.ndim or scale.shape[:-1] != data.shape[:-1]:
        raise invalid("scale", f"leading dimensions {list(data.shape[:-1])}", list(scale.shape))
    if group_size is None:
        group_size = k // scale.shape[-1] if scale.shape[-1] else 0
    group_size = _known_group(f, group_size)
    if scale.shape[-1] * group_size != k:
        want = f"{k} / {group_size} values in the last dimension"
        raise invalid("scale", want, f"{scale.shape[-1]}")
    return group_size


def _checked_global(f: Format, data: torch.Tensor, global_scale: object) -> torch.Tensor | None:
    if global_scale is None:
        return None
    if not f.has_global:
        raise invalid("global_scale", f"None for {f.name}", "a scale")
    if not isinstance(global_scale, torch.Tensor):
        raise invalid("global_scale", "a torch.Tensor", type(global_scale).__name__)
    if global_scale.dtype != torch.float32 or global_scale.device != data.device:
        want = f"float32 on {data.device}"
        raise invalid("global_scale", want, f"{global_scale.dtype} on {global_scale.device}")
    if global_scale.numel() == 1:
        return global_scale.reshape(())
    lead = data.shape[: global_scale.ndim]
    if global_scale.ndim >= data.ndim or global_scale.shape != lead:
        want = f"[] or the first leading dimensions of {list(data.shape)}"
        raise invalid("global_scale", want, list(global_scale.shape))
    return global_scale
