"""Scale formats: e8m0 bytes and e4m3 rows."""

import ml_dtypes
import numpy as np
import pytest
import torch

from cutemoe.formats import e8m0, fp8
from tests.formats import oracle


def test_every_e8m0_byte_decodes():
    byte = np.arange(256, dtype=np.uint8)
    want = byte.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    got = e8m0.decode(torch.from_numpy(byte)).numpy()
    np.testing.assert_array_equal(got[:255].view(np.uint32), want[:255].view(np.uint32))
    assert got[0] == 2.0**-127 and np.isnan(got[255]) and np.isnan(want[255])


def test_exponent_field():
    x = torch.tensor([0.0, 1e-45, 2.0**-126, 1.0, -1.5, 3.4e38, torch.inf, torch.nan])
    assert e8m0.exponent_field(x).tolist() == [0, 0, 1, 127, 127, 254, 255, 255]


def test_every_e4m3_byte_decodes():
    byte = torch.arange(256, dtype=torch.uint8)
    got = fp8.FP8.decode(byte.view(torch.float8_e4m3fn)).numpy()
    np.testing.assert_array_equal(got.astype(np.float64), oracle.code_values("fp8"))


@pytest.mark.parametrize("values", [oracle.every_bfloat16, oracle.every_float16])
@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-9])
def test_every_16_bit_value_with_a_static_scale(values, scale):
    x = values().float()
    got = fp8.encode_with(x, torch.tensor(scale)).view(torch.uint8).numpy()
    with np.errstate(all="ignore"):
        y = np.clip(x.numpy() / np.float32(scale), np.float32(-448), np.float32(448))
    want = y.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    finite = torch.isfinite(x).numpy()
    np.testing.assert_array_equal(got[finite], want[finite])
    assert np.all(got[~finite] & 0x7F == 0x7F)


def test_e4m3_ties_and_neighbours():
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (grid[1:] + grid[:-1]) / 2
    x = torch.cat([torch.nextafter(ties, torch.tensor(v)) for v in (torch.inf, -torch.inf)])
    x = torch.cat((x, ties, grid))
    x = torch.cat((x, -x))
    got = fp8.encode_with(x, torch.tensor(1.0)).view(torch.uint8).numpy()
    want = x.numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    np.testing.assert_array_equal(got, want)


def test_row_scales():
    x = torch.tensor([[0.0, 0.0], [448.0, -1.0], [-896.0, 1.0], [1e-45, 0.0], [torch.inf, 1.0]])
    # 1e-45 / 448 underflows to zero: a scale of 0 would turn the zeros of the row into NaN
    assert fp8.row_scale(x).tolist() == [1.0, 1.0, 2.0, 1.0, torch.inf]
    assert torch.isnan(fp8.row_scale(torch.tensor([[torch.nan, 1.0]])))


def test_scales_broadcast_over_the_last_dimension():
    x = torch.arange(24.0).view(2, 3, 4)
    scale = torch.tensor([[1.0, 2.0, 4.0], [0.5, 1.0, 2.0]])
    got = fp8.encode_with(x, scale)
    for i in range(2):
        for j in range(3):
            assert torch.equal(got[i, j].float(), fp8.encode_with(x[i, j], scale[i, j]).float())
