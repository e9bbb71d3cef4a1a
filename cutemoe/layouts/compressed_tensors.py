"""Checkpoints of llm-compressor in its formats `pack-quantized` (int4) and `nvfp4-pack-quantized`.

int4: `<prefix>.weight_packed` int32 [..., N, K/8], eight codes a word, the first in the lowest
bits, each stored as value + 8; `.weight_scale` [..., N, K/group_size], the multiplier. Symmetric
only, packed along K.

nvfp4: `<prefix>.weight_packed` uint8 [..., N, K/2]; `.weight_scale` float8_e4m3fn [..., N, K/16];
`.weight_global_scale` float32 [1], the divisor 448 * 6 / amax. It becomes the multiplier
1 / divisor, rounded once, so a divisor written back may differ in its last bit.
"""

from __future__ import annotations

import torch

from cutemoe.errors import invalid
from cutemoe.formats import QuantizedTensor
from cutemoe.layouts.checkpoint import (
    Checkpoint,
    Tensors,
    exact_bfloat16,
    refuse,
    stored_as,
    take,
)

# value + 8 and two's complement differ in the top bit of the nibble
_OFFSET = 0x88


def read(tensors: Tensors, prefix: str) -> QuantizedTensor:
    """The tensors under prefix -> int4 or nvfp4 [..., N, K], by the dtype of `weight_packed`.

    Raises:
        InvalidCall: a tensor is missing or has another dtype or shape, zero points or an
            activation order exist, or int4 scales are not exact in bfloat16.
    """
    unsupported = {
        f"{prefix}.weight_zero_point": "only symmetric weights are supported",
        f"{prefix}.weight_g_idx": "weights in activation order are unsupported",
    }
    refuse(tensors, unsupported)
    packed = take(tensors, f"{prefix}.weight_packed", torch.int32, torch.uint8)
    name = f"{prefix}.weight_scale"
    if packed.dtype == torch.uint8:
        scale = take(tensors, name, torch.float8_e4m3fn, torch.uint8)
        divisor = take(tensors, f"{prefix}.weight_global_scale", torch.float32)
        return QuantizedTensor(packed, scale, 1.0 / divisor, format="nvfp4")
    scale = take(tensors, name, torch.bfloat16, torch.float16, torch.float32)
    data = packed.contiguous().view(torch.uint8) ^ _OFFSET
    return QuantizedTensor(data, exact_bfloat16(name, scale), format="int4")


def write(q: QuantizedTensor, prefix: str) -> dict[str, torch.Tensor]:
    """int4 or nvfp4 [..., N, K] -> the tensors `read` takes.

    Raises:
        InvalidCall: q has another format, or nvfp4 a global scale that is not a scalar.
    """
    q = stored_as(q, "int4", "nvfp4")
    names = {"packed": f"{prefix}.weight_packed", "scale": f"{prefix}.weight_scale"}
    if q.format == "int4":
        words = (q.data ^ _OFFSET).contiguous().view(torch.int32)
        return {names["packed"]: words, names["scale"]: q.scale}
    g = q.global_scale
    if g is None:
        g = torch.ones((), dtype=torch.float32, device=q.device)
    if g.ndim:
        raise invalid("q.global_scale", "a scalar: one tensor for each expert", list(g.shape))
    divisor = (1.0 / g).reshape(1)
    return {
        names["packed"]: q.data,
        names["scale"]: q.scale,
        f"{prefix}.weight_global_scale": divisor,
    }


COMPRESSED_TENSORS = Checkpoint("compressed_tensors", ("int4", "nvfp4"), read, write)
