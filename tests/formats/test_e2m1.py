import ml_dtypes
import numpy as np
import pytest
import torch

from cutemoe.formats import e2m1
from tests.formats import oracle

TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def test_every_code_decodes():
    want = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    got = e2m1.decode(torch.arange(16, dtype=torch.uint8))
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy().view(np.uint32), want.view(np.uint32))
    assert tuple(got[:8].tolist()) == e2m1.VALUES


def test_every_byte_decodes_the_low_nibble_first():
    byte = torch.arange(256, dtype=torch.uint8)
    got = e2m1.decode_bytes(byte.view(4, 64))
    assert got.shape == (4, 128)
    want = torch.stack((e2m1.decode(byte & 15), e2m1.decode(byte >> 4)), -1).view(4, 128)
    assert torch.equal(got.view(torch.int32), want.view(torch.int32))


def test_pack_and_unpack_are_inverse():
    byte = torch.arange(256, dtype=torch.uint8).view(2, 128)
    assert torch.equal(e2m1.pack(e2m1.unpack(byte)), byte)
    assert e2m1.pack(torch.tensor([1, 2], dtype=torch.uint8)).item() == 0x21


@pytest.mark.parametrize("values", [oracle.every_bfloat16, oracle.every_float16])
def test_every_16_bit_value_encodes(values):
    x = values().float()
    np.testing.assert_array_equal(e2m1.encode(x).numpy(), oracle.e2m1_codes(x.numpy()))


def test_ties_and_their_neighbours():
    ties = torch.tensor(TIES)
    up, down = (torch.nextafter(ties, torch.tensor(v)) for v in (torch.inf, -torch.inf))
    x = torch.cat((ties, up, down))
    x = torch.cat((x, -x))
    np.testing.assert_array_equal(e2m1.encode(x).numpy(), oracle.e2m1_codes(x.numpy()))
    # to the code with an even mantissa bit
    assert e2m1.decode(e2m1.encode(ties)).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


def test_saturation_infinities_nan_and_signed_zeros():
    x = torch.tensor([6.0, 6.1, 1e38, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, -1e-45])
    assert e2m1.encode(x).tolist() == [7, 7, 7, 7, 15, 0, 8, 0, 8]
    nan = torch.tensor([0x7FC00000, -0x00400000], dtype=torch.int32).view(torch.float32)
    assert e2m1.encode(nan).tolist() == [0, 8]
