"""NVFP4 checkpoints of NVIDIA ModelOpt.

`<prefix>.weight` uint8 [..., N, K/2], `.weight_scale` float8_e4m3fn [..., N, K/16] and
`.weight_scale_2` float32 [] or [E], the multiplier: value = code * weight_scale * weight_scale_2,
with weight_scale_2 = amax / (6 * 448), or / (6 * 256) in "four over six" exports.

`<prefix>.input_scale` float32 is the multiplier of the activations, amax / (6 * 448): it is an
entry of `input_scale` of `prepare_moe(..., activations="nvfp4")` as it is, not its reciprocal.
"""

from __future__ import annotations

import torch

from cutemoe.formats import QuantizedTensor
from cutemoe.layouts.checkpoint import Checkpoint, Tensors, refuse, stored_as, take


def read(tensors: Tensors, prefix: str) -> QuantizedTensor:
    """The three tensors under prefix -> nvfp4 [..., N, K], sharing their memory.

    Raises:
        InvalidCall: a tensor is missing or has another dtype or shape, or the activations must be
            scaled per channel first (`pre_quant_scale`).
    """
    refuse(tensors, {f"{prefix}.pre_quant_scale": "activations scaled by channel are unsupported"})
    return QuantizedTensor(
        take(tensors, f"{prefix}.weight", torch.uint8),
        take(tensors, f"{prefix}.weight_scale", torch.float8_e4m3fn, torch.uint8),
        take(tensors, f"{prefix}.weight_scale_2", torch.float32),
        format="nvfp4",
    )


def write(q: QuantizedTensor, prefix: str) -> dict[str, torch.Tensor]:
    """nvfp4 [..., N, K] -> the three tensors `read` takes.

    Raises:
        InvalidCall: q has another format.
    """
    q = stored_as(q, "nvfp4")
    g = q.global_scale
    one = torch.ones((), dtype=torch.float32, device=q.device)
    return {
        f"{prefix}.weight": q.data,
        f"{prefix}.weight_scale": q.scale,
        f"{prefix}.weight_scale_2": one if g is None else g,
    }


MODELOPT = Checkpoint("modelopt", ("nvfp4",), read, write)
