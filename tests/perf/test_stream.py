"""The bandwidth kernel reads every element exactly once."""

import ceilings
import pytest
import torch

from cutemoe.runtime.device import Device


@pytest.mark.parametrize(("block", "unroll"), [(64, 1), (32, 4)])
def test_sums_of_blocks(device: torch.device, block: int, unroll: int) -> None:
    if device.type == "cpu" and not Device.of(device).interprets:
        pytest.skip("needs TRITON_INTERPRET=1")
    x = torch.arange(1024, dtype=torch.float32, device=device)
    got = ceilings.streaming(x, block, unroll, 4)()
    assert isinstance(got, torch.Tensor)
    assert torch.equal(got, x.view(-1, block * unroll).sum(1))
