"""Block scale e8m0: byte b is 2^(b - 127), 255 is NaN (OCP MX v1.0)."""

import torch

NAN = 255


def decode(byte: torch.Tensor) -> torch.Tensor:
    """uint8 [...] -> float32 [...], exact; byte 0 is the float32 subnormal 2^-127."""
    b = byte.to(torch.int32)
    bits = torch.where(b == 0, 0x00400000, b << 23)
    bits = torch.where(b == NAN, 0x7FC00000, bits)
    return bits.to(torch.int32).view(torch.float32)


def exponent_field(x: torch.Tensor) -> torch.Tensor:
    """float32 [...] -> int32 [...] biased exponent: 0 for subnormals, 255 for non-finite."""
    return (x.contiguous().view(torch.int32) >> 23) & 0xFF
