"""gpt-oss checkpoints: mxfp4 in blocks of 32.

`<prefix>_blocks` uint8 [E, N, K/32, 16] and `<prefix>_scales` uint8 [E, N, K/32], with prefix
`...experts.gate_up_proj` (N = 2I, rows interleaved: gate_up="interleaved") or `...down_proj`.
Biases `<prefix>_bias` [E, N] are plain tensors.
"""

from __future__ import annotations

import torch

from cutemoe.errors import invalid
from cutemoe.formats import QuantizedTensor
from cutemoe.layouts.checkpoint import Checkpoint, Tensors, stored_as, take


def read(tensors: Tensors, prefix: str) -> QuantizedTensor:
    """`<prefix>_blocks` and `<prefix>_scales` -> mxfp4 [..., N, K], sharing their memory.

    Raises:
        InvalidCall: a tensor is missing or has another dtype or shape.
    """
    blocks = take(tensors, f"{prefix}_blocks", torch.uint8)
    scales = take(tensors, f"{prefix}_scales", torch.uint8)
    if blocks.ndim < 2 or blocks.shape[-1] != 16 or blocks.shape[:-1] != scales.shape:
        want = f"shape {[*scales.shape, 16]}, from {prefix}_scales"
        raise invalid(f"{prefix}_blocks", want, list(blocks.shape))
    return QuantizedTensor(blocks.flatten(-2), scales, format="mxfp4")


def write(q: QuantizedTensor, prefix: str) -> dict[str, torch.Tensor]:
    """mxfp4 [..., N, K] -> the two tensors `read` takes.

    Raises:
        InvalidCall: q has another format.
    """
    q = stored_as(q, "mxfp4")
    blocks = q.data.unflatten(-1, (q.scale.shape[-1], 16))
    return {f"{prefix}_blocks": blocks, f"{prefix}_scales": q.scale}


GPT_OSS = Checkpoint("gpt_oss", ("mxfp4",), read, write)
