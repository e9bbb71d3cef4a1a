"""NVFP4: e2m1 codes, one e4m3 scale per 16 values, one float32 multiplier over them.

value = code * scale * global_scale, with global_scale = amax / (448 * 6) in checkpoints
(`weight_scale_2` of NVIDIA ModelOpt).
"""

import torch

from cutemoe.formats import e2m1
from cutemoe.formats.format import Format, grouped

SCALE_MAX = 448.0


def default_global_scale(x: torch.Tensor) -> torch.Tensor:
    """The float32 multiplier that lets the largest finite value use the whole range; [] float32."""
    a = torch.where(torch.isfinite(x), x.abs(), 0.0)
    amax = a.amax() if a.numel() else a.new_zeros(())
    d = amax / torch.tensor(SCALE_MAX * e2m1.MAX, dtype=torch.float32)
    return torch.where(d > 0, d, 1.0)


def encode_blocks(
    blocks: torch.Tensor, multiplier: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """blocks float32 [..., 16], multiplier g = 1 / global_scale -> codes, e4m3 scale [...].

    One order, IEEE operations only: s = e4m3(min(amax * (g * (1/6)), 448)), r = g / s,
    code = e2m1(x * r), s == 0 gives code 0. Another order flips codes: x * (g / s) against
    x / (s / g) differs in 7799 of 16 M nibbles on bf16 data. A block with a NaN or an infinity
    gets the NaN scale and zero codes.
    """
    amax = blocks.abs().amax(-1)
    sixth = torch.tensor(1.0 / 6.0, dtype=torch.float32, device=blocks.device)
    s = (amax * (multiplier * sixth)).clamp(max=SCALE_MAX)
    s = torch.where(torch.isfinite(amax), s, torch.nan).to(torch.float8_e4m3fn)
    wide = s.to(torch.float32)
    code = e2m1.encode(blocks * (multiplier / wide)[..., None])
    return torch.where((wide > 0)[..., None], code, 0).to(torch.uint8), s


def _encode(
    x: torch.Tensor, group_size: int | None, global_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    d = default_global_scale(x) if global_scale is None else global_scale
    blocks = grouped(x, group_size or 16)
    g = 1.0 / d
    code, s = encode_blocks(blocks, g.reshape(g.shape + (1,) * (blocks.ndim - 1 - g.ndim)))
    return e2m1.pack(code.flatten(-2)), s, d


def _decode(data: torch.Tensor) -> torch.Tensor:
    return e2m1.decode(e2m1.unpack(data))


NVFP4 = Format(
    name="nvfp4",
    data_dtype=torch.uint8,
    scale_dtype=torch.float8_e4m3fn,
    codes_per_byte=2,
    group_sizes=(16,),
    has_global=True,
    encode=_encode,
    decode=_decode,
    decode_scale=lambda s: s.to(torch.float32),
)
