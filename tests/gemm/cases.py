"""Grouped GEMM calls, and an oracle that shares no code with the package."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

import cutemoe
from tests import strategies as draw
from tests.moe.cases import DTYPES, Target, values

# weights, x: what the Triton kernel takes, then what only torch does
SUPPORTED = (
    ("bf16", "bf16"),
    ("fp16", "fp16"),
    ("mxfp4", "bf16"),
    ("mxfp4", "fp16"),
    ("mxfp4", "fp8"),
    ("nvfp4", "bf16"),
    ("nvfp4", "fp16"),
    ("nvfp4", "fp8"),
    ("int4", "bf16"),
    ("int4", "fp16"),
    ("int4", "fp8"),
)
TORCH_ONLY = (("fp8", "bf16"), ("fp8", "fp16"), ("fp8", "fp8"), ("bf16", "fp8"))
COMBINATIONS = SUPPORTED + TORCH_ONLY
X = {**DTYPES, "fp8": torch.float8_e4m3fn}
KINDS = {dtype: kind for kind, dtype in X.items()}


@st.composite
def group_sizes(draw_: st.DrawFn, most_groups: int = 6, most_rows: int = 40) -> list[int]:
    """Rows of every group, some of them none."""
    return draw_(st.lists(st.integers(0, most_rows // 2), min_size=1, max_size=most_groups))


def offsets_of(sizes: list[int]) -> torch.Tensor:
    """int32 [G+1]."""
    return torch.tensor([0, *sizes]).cumsum(0).int()


def naive(
    x: torch.Tensor,
    w: Any,
    offsets: torch.Tensor,
    x_scale: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """[R, N] in dtype, one group at a time."""
    wide, out = values(w, dtype), torch.zeros(x.shape[0], w.shape[1], dtype=dtype)
    scale = torch.ones(()) if x_scale is None else x_scale
    a = x.to(dtype) * scale.to(dtype).expand(x.shape[0])[:, None]
    for g in range(w.shape[0]):
        rows = slice(int(offsets[g]), int(offsets[g + 1]))
        out[rows] = a[rows] @ wide[g].T
    return out


def out_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a result."""
    return torch.bfloat16 if x.dtype == torch.float8_e4m3fn else x.dtype


def sum_bits(target: Target, kind: str) -> int:
    """Bits of a sum that are kept: wgmma of fp8 aligns products to the largest of them."""
    return 12 if (target.backend, kind) == ("cute", "fp8") else 24


def exact_x(rows: int, k: int, kind: str, seed: int, most: int = 8) -> torch.Tensor:
    """Integers up to `most`."""
    return draw.integers((rows, k), seed, most, torch.float32).to(X[kind])


def call(
    target: Target,
    x: torch.Tensor,
    w: Any,
    offsets: torch.Tensor,
    x_scale: torch.Tensor | None = None,
    *,
    prepared: bool = False,
    **kwargs: Any,
) -> torch.Tensor:
    """`grouped_gemm` on the target, skipped where the back end refuses; the result on the CPU.

    With `prepared` the weights are in the layout that the back end prefers, else in rows.
    """
    args: Any = tuple(target.put(a) for a in (x, w, offsets))
    if isinstance(w, cutemoe.QuantizedTensor):
        args = (args[0], w.to(target.device), args[2])
    if prepared:
        w = cutemoe.prepare_grouped_gemm(
            args[1], activations=KINDS[x.dtype], backend=target.backend
        )
        args = (args[0], w, args[2])
    kwargs["x_scale"] = target.put(x_scale)
    target.willing("grouped_gemm", *args, **kwargs)
    return cutemoe.grouped_gemm(*args, backend=target.backend, **kwargs).cpu()
