"""Row orders of the first weight of a gated layer, [..., 2I, K], and of its bias [..., 2I].

"gate_up" has gate row j at j and up row j at I + j, "up_gate" the reverse; "interleaved" has them
at 2j and 2j + 1 (gpt-oss). Kernels read all three; a conversion is for other readers of the bytes.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from cutemoe.errors import invalid
from cutemoe.formats import QuantizedTensor
from cutemoe.layouts.layout import Layout, Shape

ORDERS = ("gate_up", "up_gate", "interleaved")

Rows = TypeVar("Rows", torch.Tensor, QuantizedTensor)


def reorder(w: Rows, source: str, target: str, *, dim: int = -2) -> Rows:
    """The same rows in another order.

    Args:
        w: a weight [..., 2I, K], quantized or not; with dim=-1 a bias [..., 2I].
        source, target: "gate_up", "up_gate" or "interleaved".
        dim: where the 2I rows are; of a QuantizedTensor always -2.

    Raises:
        InvalidCall: unknown order, no such dimension, or an odd number of rows.
    """
    for name, order in (("source", source), ("target", target)):
        if order not in ORDERS:
            raise invalid(name, "one of " + ", ".join(map(repr, ORDERS)), repr(order))
    shape = tuple(w.shape)
    if not -len(shape) <= dim < len(shape) or shape[dim] % 2:
        raise invalid("w", f"an even number of rows in dimension {dim}", list(shape))
    if isinstance(w, torch.Tensor):
        return _reordered(w, source, target, dim % len(shape))
    rows = len(shape) - 2
    if dim % len(shape) != rows:
        raise invalid("dim", "-2 for a QuantizedTensor", dim)

    def moved(t: torch.Tensor) -> torch.Tensor:
        # scales of whole tensors or experts have no row dimension
        return _reordered(t, source, target, rows) if t.ndim > rows else t

    g = None if w.global_scale is None else moved(w.global_scale)
    return QuantizedTensor(
        moved(w.data), moved(w.scale), g, format=w.format, group_size=w.group_size
    )


def _reordered(t: torch.Tensor, source: str, target: str, dim: int) -> torch.Tensor:
    if source == target:
        return t
    # two halves as a dimension of their own: [2, I], or [I, 2] where interleaved
    half = t.shape[dim] // 2
    t = t.unflatten(dim, (half, 2) if source == "interleaved" else (2, half))
    if source == "interleaved":
        t = t.transpose(dim, dim + 1)
    if "up_gate" in (source, target):
        t = torch.cat((t.narrow(dim, 1, 1), t.narrow(dim, 0, 1)), dim)
    if target == "interleaved":
        t = t.transpose(dim, dim + 1)
    return t.flatten(dim, dim + 1)


def _order(name: str, order: str) -> Layout:
    def restore(packed: torch.Tensor, shape: Shape) -> torch.Tensor:
        return _reordered(packed, order, "gate_up", packed.ndim - 2)

    return Layout(
        name=name,
        rows=2,
        columns=1,
        move=lambda x: _reordered(x, "gate_up", order, x.ndim - 2),
        restore=restore,
        moved=lambda shape: shape,
    )


UP_GATE = _order("w13_up_gate", "up_gate")
INTERLEAVED = _order("w13_interleaved", "interleaved")
