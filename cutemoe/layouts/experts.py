"""From one tensor for each projection and expert, as most checkpoints have them, to [E, N, K]."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cutemoe.errors import invalid
from cutemoe.formats import QuantizedTensor


def stack_experts(experts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """E tensors [N, K] of one format and shape -> [E, N, K]; global scales become [E].

    Raises:
        InvalidCall: no experts, or they differ in format, group size or shape.
    """
    first = _alike("experts", experts)
    scales = [_global(q) for q in experts]
    has_global = any(q.global_scale is not None for q in experts)
    return QuantizedTensor(
        torch.stack([q.data for q in experts]),
        torch.stack([q.scale for q in experts]),
        torch.stack(scales) if has_global else None,
        format=first.format,
        group_size=first.group_size,
    )


def join_rows(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Tensors [..., N, K] one below the other: gate and up become w13 (gate_up="gate_up").

    Raises:
        InvalidCall: no parts, they differ in format, group size or shape, or in a scale that has
            no row dimension (reads the values).
    """
    first = _alike("parts", parts)
    rows = first.ndim - 2

    def joined(name: str, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        if pieces[0].ndim > rows:
            return torch.cat(list(pieces), dim=rows)
        for i, piece in enumerate(pieces):
            if not torch.equal(piece, pieces[0]):
                fix = "quantize the parts with one scale"
                raise invalid(f"parts[{i}].{name}", "that of parts[0]", "another", fix)
        return pieces[0]

    g = joined("global_scale", [_global(q) for q in parts])
    return QuantizedTensor(
        torch.cat([q.data for q in parts], dim=rows),
        joined("scale", [q.scale for q in parts]),
        None if first.global_scale is None else g,
        format=first.format,
        group_size=first.group_size,
    )


def _alike(argument: str, tensors: Sequence[QuantizedTensor]) -> QuantizedTensor:
    if not tensors:
        raise invalid(argument, "at least one tensor", "none")
    first = tensors[0]
    if first.ndim < 2:
        raise invalid(argument, "tensors [..., N, K]", list(first.shape))
    for i, q in enumerate(tensors):
        if _kind(q) != _kind(first):
            raise invalid(f"{argument}[{i}]", f"as {argument}[0], {first!r}", repr(q))
    return first


def _kind(q: QuantizedTensor) -> tuple[object, ...]:
    return q.format, q.group_size, q.shape, q.scale.shape, _global(q).shape


def _global(q: QuantizedTensor) -> torch.Tensor:
    if q.global_scale is not None:
        return q.global_scale
    return torch.ones((), dtype=torch.float32, device=q.device)
