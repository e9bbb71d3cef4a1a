"""A token has the same bits whatever else is in its batch; random layers show any other order."""

import pytest

import cutemoe
from tests import strategies as draw
from tests.close import assert_same
from tests.moe.cases import Target, random_layer

CUTE = Target("cute", "cuda")
SIZES = (1, 2, 7, 8, 9, 16, 17, 31, 40, 63, 96, 128, 129, 200, 257)


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_a_token_does_not_see_its_neighbours(format):
    """Every size has tiles of its own, from 16 tokens on two blocks to 128 on four."""
    CUTE.available()
    layer = random_layer(format, E=4, H=320, I=224, gate_up="interleaved")
    moe = layer.prepared(CUTE)
    x = draw.normal((max(SIZES), 320), 1, layer.dtype).to("cuda")
    ids, weights = cutemoe.route(draw.normal((max(SIZES), 4), 2).to("cuda"), 2)
    want = cutemoe.fused_moe(x, moe, ids, weights, backend="cute")
    for n in SIZES:
        got = cutemoe.fused_moe(x[:n], moe, ids[:n], weights[:n], backend="cute")
        assert_same(got, want[:n], f"{n} tokens")
