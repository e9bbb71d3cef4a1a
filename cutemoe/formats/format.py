"""What a format is: a row of data that quantises, decodes and checks. Adding one is adding a row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Encoded = tuple[torch.Tensor, torch.Tensor, "torch.Tensor | None"]


@dataclass(frozen=True)
class Format:
    """Bits of one quantized format.

    Attributes:
        name: lower-case name used everywhere.
        data_dtype, scale_dtype: storage of the codes and of the block scales.
        codes_per_byte: 2 for 4-bit codes, the low nibble is the even index; else 1.
        group_sizes: values along the last dimension that may share a scale, the default first;
            empty where a scale covers whole rows or tensors.
        has_global: a float32 multiplier over the block scales exists.
        encode: (x float32, group_size, global_scale) -> data, scale, global_scale.
        decode: data -> float32 codes, one per value.
        decode_scale: scale -> float32.
    """

    name: str
    data_dtype: torch.dtype
    scale_dtype: torch.dtype
    codes_per_byte: int
    group_sizes: tuple[int, ...]
    has_global: bool
    encode: Callable[[torch.Tensor, int | None, torch.Tensor | None], Encoded]
    decode: Callable[[torch.Tensor], torch.Tensor]
    decode_scale: Callable[[torch.Tensor], torch.Tensor]


def grouped(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """[..., K] -> [..., K / group_size, group_size]."""
    return x.unflatten(-1, (-1, group_size))
