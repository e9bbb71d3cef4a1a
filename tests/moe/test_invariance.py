"""A token has the same bits whatever else is in its batch; random layers show any other order."""

import pytest
import torch

import cutemoe
from cutemoe.layouts.sm90_rs_w4 import WEIGHTS
from tests import strategies as draw
from tests.moe.cases import Target, random_layer

CUTE = Target("cute", "cuda")
MOST = 257


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("format", "activations"),
    [(format, compute) for compute, formats in WEIGHTS.items() for format in formats],
)
def test_a_token_does_not_see_its_neighbours(format, activations):
    """Every batch up to 257: tiles from 16 tokens on two blocks to 112 or 128 on four.

    The configurations are those of the batch, so few kernels are compiled; all results stay on the
    card and are compared at once.
    """
    CUTE.available()
    layer = random_layer(format, activations, E=4, H=320, I=224, gate_up="interleaved")
    moe = layer.prepared(CUTE)
    assert moe.w13.layout.startswith("sm90_rs_w4")
    x = draw.normal((MOST, 320), 1, layer.dtype).to("cuda")
    ids, weights = cutemoe.route(draw.normal((MOST, 4), 2).to("cuda"), 2)
    want = cutemoe.fused_moe(x, moe, ids, weights, backend="cute")
    same = torch.stack(
        [
            (cutemoe.fused_moe(x[:n], moe, ids[:n], weights[:n], backend="cute") == want[:n]).all()
            for n in range(1, MOST + 1)
        ]
    )
    assert want.isfinite().all()
    wrong = (~same).nonzero().flatten() + 1
    assert wrong.tolist() == [], "batches in which a token has other bits"
