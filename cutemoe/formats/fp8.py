"""FP8 e4m3fn with a float32 scale for each row, or one for the tensor."""

import torch

from cutemoe.formats.format import Format, divided

MAX = 448.0


def row_scale(x: torch.Tensor) -> torch.Tensor:
    """float32 [..., K] -> float32 [...]: amax / 448, 1 where that is zero."""
    s = divided(x.abs().amax(-1), MAX)
    return torch.where(s == 0, 1.0, s)


def encode_with(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 x [..., K], scale [] or [...] -> e4m3fn [..., K] of x / scale, saturating at 448.

    NaN and infinity give NaN: e4m3fn has no infinity, and a clamped one would pass unnoticed.
    """
    y = x / (scale[..., None] if scale.ndim else scale)
    y = torch.where(torch.isfinite(x), y.clamp(-MAX, MAX), torch.nan)
    return y.to(torch.float8_e4m3fn)


def _encode(
    x: torch.Tensor, group_size: int | None, global_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    s = row_scale(x)
    return encode_with(x, s), s


FP8 = Format(
    name="fp8",
    data_dtype=torch.float8_e4m3fn,
    scale_dtype=torch.float32,
    codes_per_byte=1,
    group_sizes=(),
    encode=_encode,
    decode=lambda data: data.to(torch.float32),
    decode_scale=lambda s: s,
)
