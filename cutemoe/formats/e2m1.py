"""FP4 e2m1 codes: nibble s|ee|m, magnitudes 0 .5 1 1.5 2 3 4 6 (OCP MX v1.0, table 5).

Two codes a byte, the low nibble is the even index. No infinity and no NaN: conversion saturates at
6, and NaN gives a zero of its sign, so formats must carry NaN in the block scale.
"""

import torch

from cutemoe.formats.format import decode_pairs

MAX = 6.0
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def encode(x: torch.Tensor) -> torch.Tensor:
    """float32 [...] -> uint8 code [...], round to nearest even, saturating."""
    a = x.abs()
    code = (a > 0.25).to(torch.uint8)
    # a tie goes to the code with an even mantissa bit: up where the lower code is odd
    for tie, goes_up in ((0.75, 1), (1.25, 0), (1.75, 1), (2.5, 0), (3.5, 1), (5.0, 0)):
        code += (a >= tie) if goes_up else (a > tie)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def decode(code: torch.Tensor) -> torch.Tensor:
    """uint8 code [...], the upper nibble ignored -> float32 [...], exact."""
    # arithmetic, not a table: copying one to a GPU would synchronise
    c = code.to(torch.int32)
    exponent, mantissa = (c >> 1) & 3, c & 1
    halves = torch.where(exponent == 0, mantissa, (2 + mantissa) << (exponent - 1).clamp(min=0))
    return torch.where((c & 8) == 0, halves, -halves.to(torch.float32)) * 0.5


def decode_bytes(data: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K/2], two codes a byte -> float32 [..., K], exact."""
    return decode_pairs(data, decode)


def pack(code: torch.Tensor) -> torch.Tensor:
    """uint8 code [..., K] -> uint8 [..., K/2], the low nibble is the even index."""
    return code[..., 0::2] | (code[..., 1::2] << 4)


def unpack(data: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K/2] -> uint8 code [..., K]."""
    return torch.stack((data & 0xF, data >> 4), dim=-1).flatten(-2)
