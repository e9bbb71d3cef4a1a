"""INT4 weights, two codes a byte: the package's own bytes under two names.

`<prefix>.weight` uint8 or int8 [..., N, K/2], two's complement in [-8, 7], the low nibble is the
even index, and `<prefix>.weight_scale` [..., N, K/group_size], the multiplier. Other packings of
the same width exist (AWQ and GPTQ reorder nibbles and carry zero points); they have no reader.
"""

from __future__ import annotations

import torch

from cutemoe.formats import QuantizedTensor
from cutemoe.layouts.checkpoint import (
    Checkpoint,
    Tensors,
    exact_bfloat16,
    refuse,
    stored_as,
    take,
)


def read(tensors: Tensors, prefix: str) -> QuantizedTensor:
    """The two tensors under prefix -> int4 [..., N, K], sharing their memory.

    Raises:
        InvalidCall: a tensor is missing or has another dtype or shape, zero points exist, or the
            scales are not exact in bfloat16.
    """
    refuse(tensors, {f"{prefix}.weight_zero_point": "only symmetric weights are supported"})
    data = take(tensors, f"{prefix}.weight", torch.uint8, torch.int8)
    name = f"{prefix}.weight_scale"
    scale = take(tensors, name, torch.bfloat16, torch.float16, torch.float32)
    return QuantizedTensor(data.view(torch.uint8), exact_bfloat16(name, scale), format="int4")


def write(q: QuantizedTensor, prefix: str) -> dict[str, torch.Tensor]:
    """int4 [..., N, K] -> the two tensors `read` takes.

    Raises:
        InvalidCall: q has another format.
    """
    q = stored_as(q, "int4")
    return {f"{prefix}.weight": q.data, f"{prefix}.weight_scale": q.scale}


INT4_PACKED = Checkpoint("int4_packed", ("int4",), read, write)
