"""What a checkpoint is: names and bytes of the tensors that make up one quantized tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from cutemoe.errors import invalid
from cutemoe.formats import QuantizedTensor

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """One way to store quantized tensors, both directions.

    Attributes:
        name: what wrote it.
        formats: names of the formats it stores.
        read: (tensors, prefix) -> the quantized tensor stored under that prefix, sharing memory
            where the bytes are the same.
        write: (quantized tensor, prefix) -> its tensors by name.
    """

    name: str
    formats: tuple[str, ...]
    read: Callable[[Tensors, str], QuantizedTensor]
    write: Callable[[QuantizedTensor, str], dict[str, torch.Tensor]]


def take(tensors: Tensors, name: str, *dtypes: torch.dtype) -> torch.Tensor:
    """The tensor of that name and one of the dtypes, or InvalidCall."""
    if name not in tensors:
        near = sorted(n for n in tensors if n.split(".")[-1] == name.split(".")[-1])[:3]
        raise invalid(
            "tensors", f"{name!r}", f"no such name, but {near}" if near else "no such name"
        )
    t = tensors[name]
    if t.dtype not in dtypes:
        raise invalid(name, " or ".join(map(str, dtypes)), t.dtype)
    return t


def refuse(tensors: Tensors, names: dict[str, str]) -> None:
    """InvalidCall where a tensor exists whose meaning is not supported: name -> why."""
    for name, why in names.items():
        if name in tensors:
            raise invalid("tensors", f"no {name!r}", "one", why)


def stored_as(q: QuantizedTensor, *formats: str) -> QuantizedTensor:
    """q if it has one of the formats, or InvalidCall."""
    if q.format not in formats:
        raise invalid("q", "format " + " or ".join(map(repr, formats)), repr(q.format))
    return q


def exact_bfloat16(name: str, t: torch.Tensor) -> torch.Tensor:
    """t in bfloat16, or InvalidCall where that would round. Reads the values."""
    narrow = t.to(torch.bfloat16)
    if not torch.equal(narrow.to(t.dtype), t):
        fix = "convert the scales with .to(torch.bfloat16) to accept the rounding"
        raise invalid(name, "values that are exact in bfloat16", t.dtype, fix)
    return narrow
