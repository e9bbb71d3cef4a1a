"""The MMA with mxfp4 scales on a card, by what the card has, against dense products."""

import numpy as np
import pytest
import torch

from cutemoe.runtime.device import Device
from tests.dsl.lanes import LANES
from tests.dsl.test_mma import mx_case, mx_dense, registers

pytest.importorskip("cutlass")


@pytest.mark.gpu
@pytest.mark.parametrize("half", [0, 1])
def test_a_step_with_mxfp4_scales_is_exact(half):
    from tests.compile.mma_step import Step, build

    kernel = build(Step(Device.of(torch.device("cuda")).arch, half))
    g, t = LANES // 4, LANES % 4
    for seed in range(8):
        # every sum is a multiple of 2^-6 below 2^15
        x = mx_case(seed, 126, 129)
        a, b, sa, sb = registers(*x)
        rA, rB, rS = (
            torch.from_numpy(np.stack([r.v for r in values]).astype(np.uint32)).cuda()
            for values in (a, b, (sa, sb))
        )
        rC = torch.zeros(4, 32, device="cuda")
        kernel(rA, rB, rS, rC)
        C = np.zeros((16, 8))
        for i, c in enumerate(rC.cpu().numpy()):
            C[g + 8 * (i // 2), 2 * t + i % 2] = c
        assert np.array_equal(C, mx_dense(x, half))
