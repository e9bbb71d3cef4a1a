"""The conversions by bit patterns, executed without a GPU, against ml_dtypes and formats.nvfp4."""

import ml_dtypes
import numpy as np
import pytest
import torch

from cutemoe.formats import FORMATS, e2m1, nvfp4
from tests import strategies as draw
from tests.dsl.lanes import Float32, Uint32, device, e4m3

CODEC = device("codec")
SOFT = CODEC.Codec(80)
TIES = np.array([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 448, np.inf])


def around(values: np.ndarray) -> np.ndarray:
    """The values and their neighbours in float32."""
    v = values.astype(np.float32)
    return np.concatenate([v, np.nextafter(v, np.float32(0)), np.nextafter(v, np.float32(np.inf))])


def test_e2m1():
    random = np.random.default_rng(0).normal(size=3000).astype(np.float32) * 3
    tiny = np.array([1e-45, 1e-38, 1e-8], np.float32)
    x = np.concatenate([around(TIES), random, tiny])
    x = np.concatenate([x, -x])
    with np.errstate(all="ignore"):
        want = x.clip(-6, 6).astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    got = [int(CODEC.encode_e2m1(Float32(v)).v) for v in x]
    assert got == want.tolist()


def test_pairs_have_the_first_code_in_the_low_nibble():
    byte = SOFT.encode_e2m1_pair(Float32(1.5), Float32(-6.0))
    assert int(byte.v) == 0xF3


def test_e4m3_encode():
    every = e4m3(np.arange(0x7F))
    ties = (every[1:] + every[:-1]) / 2
    random = np.random.default_rng(1).uniform(0, 448, 2000)
    small = np.random.default_rng(2).uniform(0, 0.02, 2000)
    x = np.concatenate([around(every[:-1]), around(ties), random, small]).astype(np.float32)
    want = x.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert [int(SOFT.encode_e4m3(Float32(v)).v) for v in x] == want.tolist()


@pytest.mark.parametrize("arch", [80, 90])
def test_e4m3_decode_of_every_byte(arch):
    codec = CODEC.Codec(arch)
    for byte in range(0x80):
        pair = np.array([codec.fp16_pair(Uint32(np.array(byte))).v]).view(np.float16)
        assert pair[0] == pair[1] == e4m3(byte) or (byte == 0x7F and np.isnan(pair).all())
        if byte < 0x7F:
            assert float(codec.decode_e4m3(Uint32(byte)).v) == e4m3(byte)


def quantised(blocks: torch.Tensor, g: float | None) -> tuple[list[int], list[list[int]]]:
    """Scale bytes and codes of blocks [.., 16] or [.., 32], as the kernels compute them."""
    scales, codes = [], []
    for x in blocks.numpy():
        values = [Float32(v) for v in x]
        amax = max(int(CODEC.absolute_bits(v).v) for v in values)
        s, r = SOFT.scale_of(len(values), Uint32(amax), None if g is None else Float32(g))
        scales.append(int(s.v))
        pairs = [int(SOFT.byte_of_codes(*values[i : i + 2], r).v) for i in range(0, len(values), 2)]
        codes.append([c for p in pairs for c in (p & 15, p >> 4)])
    return scales, codes


def test_blocks_of_mxfp4_equal_the_format_bit_for_bit():
    x = draw.normal((60, 32), 5) * torch.exp2(30 * draw.normal((60, 1), 6))
    x[0], x[1, 3], x[2, 5], x[3, 7] = 0.0, torch.nan, torch.inf, -torch.inf
    x[4], x[5], x[6], x[7, 0] = -0.0, 1e-44, 3e38, 2.0**-126
    x[8:40] = torch.exp2(torch.arange(-140, 116, 8.0))[:, None] * draw.normal((32, 32), 7)
    data, scale = FORMATS["mxfp4"].encode(x, 32, None)
    assert quantised(x, None) == (scale.flatten().tolist(), e2m1.unpack(data).tolist())


@pytest.mark.parametrize("d", [1.0, 0.005, 3.7, 2.0**-118, 1e30])
def test_blocks_equal_the_format_bit_for_bit(d):
    x = draw.normal((60, 16), 5) * torch.exp2(6 * draw.normal((60, 1), 6)) * min(d, 1e6) * 300
    x[0], x[1, 3], x[2, 5], x[3, 7] = 0.0, torch.nan, torch.inf, -torch.inf
    x[4], x[5] = -0.0, 1e-44
    g = (1.0 / torch.tensor(d)).item()
    code, scale = nvfp4.encode_blocks(x, torch.full((60,), g))
    scales, codes = quantised(x, g)
    assert scales == scale.view(torch.uint8).tolist()
    assert codes == code.tolist()
