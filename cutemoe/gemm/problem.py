"""GemmProblem: all a plan may know of a grouped GEMM call, and the validation of the call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cutemoe.errors import invalid
from cutemoe.gemm.tensors import GemmTensors

ACTIVATIONS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8"}
OUTPUTS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class GemmProblem:
    """A grouped GEMM without its tensors.

    Attributes:
        rows, groups, n, k: x is [rows, k], the weights are [groups, n, k].
        weight: format of the weights, "bf16" and "fp16" for dense ones.
        group_size: values per weight scale, None where there is none.
        layout: where the bytes of the weights sit.
        activations: "bf16", "fp16" or "fp8".
        dtype: of the output, "bf16" or "fp16".
        x_scale: "none", "tensor" (one) or "row" (one per row).
    """

    rows: int
    groups: int
    n: int
    k: int
    weight: str
    group_size: int | None
    layout: str
    activations: str
    dtype: str
    x_scale: str

    @staticmethod
    def of(t: GemmTensors) -> GemmProblem:
        """Validates the tensors of a call; raises InvalidCall naming the argument."""
        x, w = t.x, t.w
        groups, n, k = w.shape
        _check_x(x, k, w.format)
        rows = x.shape[0]
        check_tensor("group_offsets", t.offsets, torch.int32, (groups + 1,), x.device)
        if not t.offsets.is_contiguous():
            raise invalid("group_offsets", "a contiguous tensor", f"strides {t.offsets.stride()}")
        check_same_device("w", w.device, x)
        kind = _check_x_scale(t.x_scale, x)
        dtype = x.dtype if x.dtype in OUTPUTS else t.out.dtype
        if dtype not in OUTPUTS:
            raise invalid("out", "bfloat16 or float16", dtype)
        check_tensor("out", t.out, dtype, (rows, n), x.device)
        check_rows("out", t.out, written=True)
        return GemmProblem(
            rows=rows,
            groups=groups,
            n=n,
            k=k,
            weight=w.format,
            group_size=w.group_size,
            layout=w.layout,
            activations=ACTIVATIONS[x.dtype],
            dtype=OUTPUTS[dtype],
            x_scale=kind,
        )


def check_tensor(
    name: str, t: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """Raises InvalidCall naming the argument unless t has this dtype, shape and device."""
    if t.dtype != dtype:
        raise invalid(name, str(dtype), t.dtype, f"{name}.to({dtype})")
    if tuple(t.shape) != shape:
        raise invalid(name, f"shape {list(shape)}", list(t.shape))
    if t.device != device:
        raise invalid(name, f"the device of x, {device}", t.device)


def check_same_device(name: str, device: torch.device, x: torch.Tensor) -> None:
    """Raises InvalidCall unless prepared weights live where x does."""
    if device != x.device:
        raise invalid(name, f"the device of x, {x.device}", device, "prepare it with device=")


def check_rows(name: str, t: torch.Tensor, *, written: bool = False) -> None:
    """Raises InvalidCall unless the rows of t [rows, n] are contiguous, and disjoint if written."""
    if t.shape[1] > 1 and t.stride(1) != 1:
        raise invalid(name, "a contiguous last dimension", f"strides {t.stride()}")
    if written and t.shape[0] > 1 and t.stride(0) < t.shape[1]:
        raise invalid(name, "rows that do not overlap", f"strides {t.stride()}")


def _check_x(x: torch.Tensor, k: int, weight: str) -> None:
    if x.dtype not in ACTIVATIONS:
        raise invalid("x", "bfloat16, float16 or float8_e4m3fn", x.dtype)
    if x.ndim != 2 or x.shape[1] != k:
        raise invalid("x", f"shape [rows, {k}] for these weights", list(x.shape))
    check_rows("x", x)
    if weight in OUTPUTS.values() and x.dtype in OUTPUTS and OUTPUTS[x.dtype] != weight:
        raise invalid("x", f"the dtype of the dense weights, {weight}", x.dtype)


def _check_x_scale(x_scale: torch.Tensor | None, x: torch.Tensor) -> str:
    if x_scale is None:
        return "none"
    if x.dtype in OUTPUTS:
        raise invalid("x_scale", f"None for x of {x.dtype}", "a tensor")
    rows = x.shape[0]
    shape = () if x_scale.ndim == 0 else (rows,)
    check_tensor("x_scale", x_scale, torch.float32, shape, x.device)
    if not x_scale.is_contiguous():
        raise invalid("x_scale", "a contiguous tensor", f"strides {x_scale.stride()}")
    return "row" if shape else "tensor"
