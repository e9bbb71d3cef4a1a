"""Activations rounded to fp8 or nvfp4, kept as the values that the tensor core multiplies: bf16, or
e4m3 for one that multiplies those.

The operations and their order are those of cutemoe.formats, IEEE float32 only, so the values equal
`cutemoe.formats` bit for bit. e4m3 values, and e2m1 times an e4m3 block scale, are exact in bf16;
row scales and global multipliers stay float32 factors of the sums.

Rejected: codes in memory, decoded by every block of outputs again; the saved bytes are few against
those of the weights, and sm_80 has no conversion from e4m3.
"""

import torch
import triton
import triton.language as tl

from cutemoe.triton_kernels import decode, launch, numeric


@triton.jit
def e4m3(y):
    """Nearest e4m3 value, ties to even, as float32; NaN stays."""
    return numeric.decode_e4m3(numeric.encode_e4m3(y))


@triton.jit
def is_finite(x):
    """Neither NaN nor infinite."""
    return tl.abs(x) < float("inf")


@triton.jit
def expert_of(row, start_ptr, E, BINS: tl.constexpr):
    """Expert of a sorted row: how many experts end at or before it."""
    bins = tl.arange(0, BINS)
    ends = tl.load(start_ptr + 1 + bins, mask=bins < E, other=2147483647)
    return tl.sum((ends <= row).to(tl.int32))


@launch.entry
@triton.jit
def quantize_rows(
    x_ptr,  # [.., W] any float
    out_ptr,  # [rows, W] bf16, or bytes of e4m3
    scale_ptr,  # float32 [rows], written where fp8 scales are dynamic
    expert_scale_ptr,  # float32 [E] or None
    slots_ptr,
    start_ptr,
    stride_xm,
    W,
    E,
    FORMAT: tl.constexpr,
    DIVIDE: tl.constexpr,
    SORTED: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program.

    SORTED: rows are sorted rows, those that no expert owns are left alone, and with DIVIDE the row
    of x is slot // DIVIDE. FORMAT "fp8": with expert_scale_ptr s is the expert's, else amax / 448.
    "nvfp4": blocks of 16 under the expert's multiplier.
    """
    row = tl.program_id(0)
    source = row
    expert = 0
    if SORTED:
        if row >= tl.load(start_ptr + E):
            return
        if DIVIDE > 0:
            source = tl.load(slots_ptr + row) // DIVIDE
        if expert_scale_ptr is not None:
            expert = expert_of(row, start_ptr, E, BINS)
    x_row = x_ptr + source.to(tl.int64) * stride_xm
    out_row = out_ptr + row.to(tl.int64) * W
    if expert_scale_ptr is not None:
        s = tl.load(expert_scale_ptr + expert)
    else:
        s = _row_scale(x_row, W, BLOCK)
        tl.store(scale_ptr + row, s)
    if FORMAT == "nvfp4":
        _nvfp4_row(x_row, out_row, s, W, BLOCK)
    else:
        _fp8_row(x_row, out_row, s, W, BLOCK)


@triton.jit
def _row_scale(x_row, W, BLOCK: tl.constexpr):
    """amax / 448, 1 where the row is zero, NaN where it has a NaN."""
    offs = tl.arange(0, BLOCK)
    amax = tl.zeros((BLOCK,), tl.float32)
    nan = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, W, BLOCK):
        x = tl.load(x_row + first + offs, mask=first + offs < W, other=0.0).to(tl.float32)
        nan |= (x != x).to(tl.int32)
        amax = tl.maximum(amax, tl.abs(x))
    most = tl.max(amax, 0)
    s = tl.where(most == 0, 1.0, tl.div_rn(most, 448.0))
    return tl.where(tl.max(nan, 0) > 0, float("nan"), s)


@triton.jit
def _fp8_row(x_row, out_row, s, W, BLOCK: tl.constexpr):
    for first in range(0, W, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        x = tl.load(x_row + offs, mask=offs < W, other=0.0).to(tl.float32)
        y = tl.div_rn(x, tl.zeros((BLOCK,), tl.float32) + s)
        # comparisons keep a NaN quotient
        y = tl.where(y > 448.0, 448.0, y)
        y = tl.where(y < -448.0, -448.0, y)
        y = tl.where(is_finite(x), y, float("nan"))
        code = numeric.encode_e4m3(y)
        if out_row.dtype.element_ty == tl.uint8:
            tl.store(out_row + offs, code.to(tl.uint8), mask=offs < W)
        else:
            value = numeric.decode_e4m3(code)
            tl.store(out_row + offs, value.to(out_row.dtype.element_ty), mask=offs < W)


@triton.jit
def _nvfp4_row(x_row, out_row, d, W, BLOCK: tl.constexpr):
    GROUPS: tl.constexpr = BLOCK // 16
    g = tl.div_rn(1.0, d)
    for first in range(0, W, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        x = tl.load(x_row + offs, mask=offs < W, other=0.0).to(tl.float32)
        x = tl.reshape(x, (GROUPS, 16))
        amax = tl.max(tl.abs(x), 1)
        # float32 of 1 / 6
        s = amax * (g * 0.16666667163372040)
        s = tl.where(s > 448.0, 448.0, s)
        broken = tl.max((~is_finite(x)).to(tl.int32), 1) > 0
        s = tl.where(broken, float("nan"), e4m3(s))
        r = tl.div_rn(tl.zeros((GROUPS,), tl.float32) + g, s)
        code = tl.where((s > 0)[:, None], numeric.encode_e2m1(x * r[:, None]), 0)
        value = decode.nibble_value(code, False) * s[:, None]
        value = tl.reshape(value, (BLOCK,))
        tl.store(out_row + offs, value.to(out_row.dtype.element_ty), mask=offs < W)


@launch.entry
@triton.jit
def widen_e4m3(x_ptr, out_ptr, stride_xm, W, BLOCK: tl.constexpr):
    """Bytes of e4m3 [rows, W] -> bf16 [rows, W], exact; one program a row and block."""
    blocks = tl.cdiv(W, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    byte = tl.load(x_ptr + row * stride_xm + offs, mask=offs < W, other=0)
    value = numeric.decode_e4m3(byte)
    tl.store(out_ptr + row * W + offs, value.to(out_ptr.dtype.element_ty), mask=offs < W)


def quantize(
    x: torch.Tensor,
    out: torch.Tensor,
    format: str,
    *,
    scale: torch.Tensor | None = None,
    expert_scale: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    divide: int = 0,
    start: torch.Tensor | None = None,
) -> None:
    """Rounds rows of x to `format`; out [rows, W] holds the values without global scales, in bf16
    or, for fp8, in e4m3.

    Args:
        x: [.., W] bf16, fp16 or float32, last dimension contiguous.
        scale: float32 [rows], receives the scales where fp8 takes those of the rows.
        expert_scale: float32 [E]: static scales of fp8, multipliers of nvfp4.
        start: int32 [E + 1] where rows are sorted rows.
        slots: int32 [R], with divide: row r of out is row slots[r] // divide of x.
    """
    rows, width = out.shape
    experts = 1 if start is None else start.numel() - 1
    quantize_rows[(rows,)](
        x,
        out.view(torch.uint8) if out.dtype == torch.float8_e4m3fn else out,
        scale,
        expert_scale,
        slots,
        start,
        x.stride(0),
        width,
        experts,
        FORMAT=format,
        DIVIDE=divide,
        SORTED=start is not None,
        BINS=max(2, launch.power_of_2(experts)),
        BLOCK=max(16, min(2048, launch.power_of_2(width))),
        **launch.options(4),
    )


def widen(x: torch.Tensor, out: torch.Tensor) -> None:
    """float8_e4m3fn [rows, W], last dimension contiguous -> bf16 [rows, W]."""
    rows, width = out.shape
    block = max(16, min(1024, launch.power_of_2(width)))
    widen_e4m3[(rows * -(-width // block),)](
        x.view(torch.uint8),
        out,
        x.stride(0),
        width,
        BLOCK=block,
        **launch.options(4),
    )
