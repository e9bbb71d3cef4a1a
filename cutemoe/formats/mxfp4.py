"""MXFP4: e2m1 codes, one e8m0 scale per 32 values (OCP MX v1.0, section 6.3)."""

import torch

from cutemoe.formats import e2m1, e8m0
from cutemoe.formats.format import Format, grouped


def _encode(
    x: torch.Tensor, group_size: int | None, global_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale 2^(floor(log2 amax) - 2); a block with a NaN or an infinity gets the NaN scale."""
    blocks = grouped(x, group_size or 32)
    field = e8m0.exponent_field(blocks.abs().amax(-1))
    byte = torch.where(field == 255, e8m0.NAN, (field - 2).clamp(min=0))
    # 2^(127 - byte) is a normal float32 for every byte a finite amax gives (0..252)
    inverse = ((254 - byte).clamp(min=0).to(torch.int32) << 23).view(torch.float32)
    code = e2m1.encode(torch.where((byte == e8m0.NAN)[..., None], 0.0, blocks * inverse[..., None]))
    return e2m1.pack(code.flatten(-2)), byte.to(torch.uint8)


MXFP4 = Format(
    name="mxfp4",
    data_dtype=torch.uint8,
    scale_dtype=torch.uint8,
    codes_per_byte=2,
    group_sizes=(32,),
    encode=_encode,
    decode=e2m1.decode_bytes,
    decode_scale=e8m0.decode,
)
