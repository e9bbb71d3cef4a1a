"""NVFP4: e2m1 codes, one e4m3 scale per 16 values, one float32 multiplier over them.

value = code * scale * global_scale, with global_scale = amax / (448 * 6) in checkpoints
(`weight_scale_2` of NVIDIA ModelOpt).
"""

import torch

from cutemoe.formats import e2m1
from cutemoe.formats.format import Format, divided, grouped, row_chunks

SCALE_MAX = 448.0
# below it 1 / global_scale / scale can exceed float32: the smallest scale is 2^-9
GLOBAL_MIN = 2.0**-118


def default_global_scale(x: torch.Tensor) -> torch.Tensor:
    """The float32 multiplier that lets the largest finite value use the whole range; [] float32.

    At least GLOBAL_MIN, so that the quantiser cannot overflow; 1 where every value is zero.
    """
    flat = x.reshape(-1)
    amax = torch.zeros((), dtype=torch.float32, device=x.device)
    for part in row_chunks(flat.numel(), 1, x.device):
        a = flat[part].to(torch.float32).abs()
        if a.numel():
            amax = torch.maximum(amax, torch.where(torch.isfinite(a), a, 0.0).amax())
    d = divided(amax, SCALE_MAX * e2m1.MAX).clamp(min=GLOBAL_MIN)
    return torch.where(amax > 0, d, 1.0)


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
    sixth = torch.full((), 1.0 / 6.0, dtype=torch.float32, device=blocks.device)
    s = (amax * (multiplier * sixth)).clamp(max=SCALE_MAX)
    s = torch.where(torch.isfinite(amax), s, torch.nan).to(torch.float8_e4m3fn)
    wide = s.to(torch.float32)
    code = e2m1.encode(blocks * (multiplier / wide)[..., None])
    return torch.where((wide > 0)[..., None], code, 0).to(torch.uint8), s


def _encode(
    x: torch.Tensor, group_size: int | None, global_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    multiplier = torch.ones((), device=x.device) if global_scale is None else 1.0 / global_scale
    code, s = encode_blocks(grouped(x, group_size or 16), multiplier[..., None])
    return e2m1.pack(code.flatten(-2)), s


NVFP4 = Format(
    name="nvfp4",
    data_dtype=torch.uint8,
    scale_dtype=torch.float8_e4m3fn,
    codes_per_byte=2,
    group_sizes=(16,),
    encode=_encode,
    decode=e2m1.decode_bytes,
    decode_scale=lambda s: s.to(torch.float32),
    default_global=default_global_scale,
)
