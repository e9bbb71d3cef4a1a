"""INT4: two's complement codes in [-8, 7], one bfloat16 scale per group, symmetric."""

import torch

from cutemoe.formats import e2m1
from cutemoe.formats.format import Format, decode_pairs, divided, grouped


def decode(code: torch.Tensor) -> torch.Tensor:
    """integer code [...] in 0..15 -> float32 [...]."""
    return ((code.to(torch.int32) ^ 8) - 8).to(torch.float32)


def _encode(
    x: torch.Tensor, group_size: int | None, global_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale bf16(amax / 7); code = round_even(x / scale) in [-8, 7]; scale 0 gives code 0."""
    blocks = grouped(x, group_size or 128)
    amax = blocks.abs().amax(-1)
    s = torch.where(torch.isfinite(amax), divided(amax, 7.0), torch.nan).to(torch.bfloat16)
    wide = s.to(torch.float32)[..., None]
    q = torch.where(wide > 0, torch.round(blocks / wide), 0.0).clamp(-8, 7)
    code = (q.to(torch.int8) & 0xF).to(torch.uint8)
    return e2m1.pack(code.flatten(-2)), s


INT4 = Format(
    name="int4",
    data_dtype=torch.uint8,
    scale_dtype=torch.bfloat16,
    codes_per_byte=2,
    group_sizes=(128, 64, 32),
    encode=_encode,
    decode=lambda data: decode_pairs(data, decode),
    decode_scale=lambda s: s.to(torch.float32),
)
