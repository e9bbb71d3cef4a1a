"""PackedWeight: the weights of G groups where a kernel wants their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from cutemoe.errors import invalid
from cutemoe.formats import FORMATS, QuantizedTensor
from cutemoe.layouts import sm80_w4, sm90_rs_w4
from cutemoe.layouts.sm120_block_scale import SM120_BLOCK_SCALE

DENSE = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# layout -> type of the tensor core operands it is made for
PACKED = {"sm80_w4_bf16": "bf16", "sm80_w4_fp16": "fp16"}
HOPPER = sm90_rs_w4.COMPUTE
# codes in rows, scales as the block-scaled MMA of SM120 reads them
SM120 = "sm120_fp4"
LAYOUTS = ("rows", *PACKED, *HOPPER, SM120)


Signature = tuple[tuple[object, ...], list[torch.Tensor]]


def signature(words: tuple[object, ...], parts: Sequence[torch.Tensor | None]) -> Signature:
    """Words and which tensors are missing, and those that are not."""
    absent = [p is None for p in parts]
    return (*words, *absent), [p for p in parts if p is not None]


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Weights [G, N, Kdim] of G groups: value = code * scale * factor.

    Attributes:
        data: codes; in layout "rows" the bytes of the checkpoint, uint8 [G, N, Kdim/2] for the
            4-bit formats, float8_e4m3fn [G, N, Kdim] for fp8, and the values if dense.
        scale: block scales; in layout "rows" [G, N, Kdim/group_size] (mxfp4 uint8, nvfp4
            float8_e4m3fn, int4 bfloat16), fp8 float32 [G, N]; None if dense.
        factor: float32 [G], multiplies the accumulator; None is 1.
        format: "bf16", "fp16" (dense), "mxfp4", "nvfp4", "int4" or "fp8".
        layout: where the bytes sit: "rows", row-major as in the checkpoint; "sm80_w4_bf16" or
            "sm80_w4_fp16" (cutemoe/layouts/sm80_w4.py), whose data, scale and factor differ;
            "sm90_rs_w4", "sm90_rs_w4_fp16" or "sm90_rs_w4_fp8" (sm90_rs_w4.py), whose scales are
            within data; or "sm120_fp4", whose scale is in layout "sm120_block_scale".
        group_size: values of the last dimension that share a scale; None if dense or fp8.
        shape: (G, N, Kdim) of the values.
        order: of the rows in layouts "sm90_rs_w4..": "plain", or how gates and ups were given.
        signature: what is no tensor of it, and its tensors, for `runtime.recall`.
    """

    data: torch.Tensor
    scale: torch.Tensor | None
    factor: torch.Tensor | None
    format: str
    layout: str
    group_size: int | None
    shape: tuple[int, int, int]
    order: str = "plain"
    signature: Signature = field(init=False, repr=False)

    def __post_init__(self) -> None:
        words = (self.format, self.layout, self.group_size, self.shape, self.order)
        parts = (self.data, self.scale, self.factor)
        object.__setattr__(self, "signature", signature(words, parts))

    @staticmethod
    def of(
        w: QuantizedTensor | torch.Tensor,
        *,
        device: torch.device | str | None = None,
        layout: str = "rows",
        order: str = "plain",
        argument: str = "w",
    ) -> PackedWeight:
        """Packs w [G, N, Kdim]; shares its memory where device and layout allow.

        Weights that a packed layout cannot hold exactly stay in "rows". `order` is that of gate and
        up rows, which layouts "sm90_rs_w4.." bring together.

        Raises:
            InvalidCall: names `argument` where w is no such tensor.
        """
        if layout not in LAYOUTS:
            raise invalid("layout", f"one of {LAYOUTS}", repr(layout))
        if not isinstance(w, (QuantizedTensor, torch.Tensor)):
            raise invalid(argument, "a QuantizedTensor or a torch.Tensor", type(w).__name__)
        if w.ndim != 3 or 0 in w.shape:
            raise invalid(argument, "shape [groups, N, K], none of them 0", list(w.shape))
        shape = (w.shape[0], w.shape[1], w.shape[2])
        if isinstance(w, QuantizedTensor):
            rows = _pack_rows(w, shape, device, argument)
            if layout == SM120:
                return _pack_sm120(rows)
            return rows if layout == "rows" else _packed(rows, layout, order)
        if w.dtype not in DENSE:
            fix = "w.to(torch.bfloat16), or cutemoe.quantize"
            raise invalid(argument, "bfloat16 or float16 values", w.dtype, fix)
        data = w.detach().to(device or w.device).contiguous()
        return PackedWeight(data, None, None, DENSE[w.dtype], "rows", None, shape)

    @property
    def device(self) -> torch.device:
        """Device of all parts."""
        return self.data.device

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together."""
        return sum(t.nbytes for t in (self.data, self.scale, self.factor) if t is not None)

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same bytes on another device."""
        scale = None if self.scale is None else self.scale.to(device)
        factor = None if self.factor is None else self.factor.to(device)
        return replace(self, data=self.data.to(device), scale=scale, factor=factor)

    def unpack(self) -> QuantizedTensor | torch.Tensor:
        """The weights as given to `of`, scales of whole tensors expanded to its groups."""
        if self.layout in HOPPER:
            return sm90_rs_w4.unpack(
                self.data,
                self.factor,
                format=self.format,
                group_size=self.group_size or 0,
                n=self.shape[1],
                k=self.shape[2],
                order=self.order,
                compute=HOPPER[self.layout],
            )
        if self.scale is None:
            return self.data
        if self.layout == "rows":
            return QuantizedTensor(
                self.data, self.scale, self.factor, format=self.format, group_size=self.group_size
            )
        if self.layout == SM120:
            groups, n, k = self.shape
            blocks = k // (self.group_size or 16)
            scale = SM120_BLOCK_SCALE.unpack(self.scale, (groups, n, blocks))
            return QuantizedTensor(self.data, scale, self.factor, format=self.format)
        return sm80_w4.unpack(
            self.data,
            self.scale,
            self.factor,
            format=self.format,
            group_size=self.group_size or 0,
            n=self.shape[1],
            k=self.shape[2],
            compute=PACKED[self.layout],
        )

    def in_rows(self) -> PackedWeight:
        """The same weights in layout "rows"."""
        return self if self.layout == "rows" else PackedWeight.of(self.unpack())

    def group(self, index: int) -> PackedWeight:
        """The weights of one group in layout "rows", with shape (1, N, Kdim)."""
        one = slice(index, index + 1)
        part = replace(
            self,
            data=self.data[one],
            scale=None if self.scale is None else self.scale[one],
            factor=None if self.factor is None else self.factor[one],
            shape=(1, *self.shape[1:]),
        )
        return part.in_rows()

    def values(self, rows: slice, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Values [rows, Kdim] of the only group, in layout "rows", without `factor`."""
        if self.scale is None:
            return self.data[0, rows].to(dtype)
        data, scale = self.data[0, rows], self.scale[0, rows]
        q = QuantizedTensor(data, scale, format=self.format, group_size=self.group_size)
        return q.dequantize(dtype)


def _packed(w: PackedWeight, layout: str, order: str) -> PackedWeight:
    """Weights in rows -> packed, or as they are where the layout refuses them."""
    q = w.unpack()
    if not isinstance(q, QuantizedTensor) or q.device.type == "meta":
        return w
    if layout in HOPPER:
        if sm90_rs_w4.refuse(q, order, HOPPER[layout]) is not None:
            return w
        data, factor = sm90_rs_w4.pack(q, order, HOPPER[layout])
        return replace(w, data=data, scale=None, factor=factor, layout=layout, order=order)
    if sm80_w4.refuse(q, PACKED[layout]) is not None:
        return w
    data, scale, factor = sm80_w4.pack(q, PACKED[layout])
    return replace(w, data=data, scale=scale, factor=factor, layout=layout)


def _pack_sm120(w: PackedWeight) -> PackedWeight:
    """FP4 weights in rows -> their scales swizzled; others as they are."""
    if w.format not in ("nvfp4", "mxfp4") or w.scale is None:
        return w
    # copies of 16 bytes read the codes
    data = w.data if w.data.data_ptr() % 16 == 0 else w.data.clone()
    return replace(w, data=data, scale=SM120_BLOCK_SCALE.pack(w.scale), layout=SM120)


def _pack_rows(
    w: QuantizedTensor,
    shape: tuple[int, int, int],
    device: torch.device | str | None,
    argument: str,
) -> PackedWeight:
    groups, n, _ = shape
    scale, factor = w.scale, w.global_scale
    if not FORMATS[w.format].group_sizes:
        scale = scale.reshape(scale.shape + (1,) * (2 - scale.ndim)).expand(groups, n)
    if factor is not None:
        if factor.ndim > 1:
            raise invalid(f"{argument}.global_scale", f"shape [] or [{groups}]", list(factor.shape))
        factor = factor.detach().expand(groups).contiguous()
    packed = PackedWeight(
        w.data.detach().contiguous(),
        scale.detach().contiguous(),
        factor,
        w.format,
        "rows",
        w.group_size,
        shape,
    )
    return packed if device is None else packed.to(device)
