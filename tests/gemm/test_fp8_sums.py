"""What wgmma of fp8 makes of sums: a model of its accumulator, and what the exact tests rely on.

The products of 32 columns and the sum so far are aligned to the largest of them, and bits further
below it than KEPT are cut off. Found by the outputs in which the kernel differs from float64 on an
H200 (2026-11): cut at 12 or 13 bits, the model differs in the same two, with the same values.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import strategies as draw
from tests.gemm.cases import Target, sum_bits
from tests.moe.cases import assert_order_free

CUTE = Target("cute", "cuda")
KEPT = 12


def wgmma(sums: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Sums [N] plus products [N, 32], float64."""
    terms = torch.cat([sums[:, None], products], 1)
    most = terms.abs().amax(1)
    lowest = torch.ldexp(torch.ones_like(most), torch.frexp(most).exponent - 1 - KEPT)
    lowest = torch.where(most > 0, lowest, 1.0)[:, None]
    return (torch.trunc(terms / lowest) * lowest).sum(1)


def dot(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """w [N, K] times x [K] in steps of 32 columns."""
    sums = torch.zeros(len(w), dtype=torch.float64)
    for products in (w * x).split(32, 1):
        sums = wgmma(sums, products)
    return sums


@given(seed=draw.seeds(), steps=st.integers(1, 4))
def test_sums_that_fit_are_exact(seed, steps):
    """Codes of e2m1 under scales 1/2 and 1 times -1, 0 and 1, as in the exact tests."""
    k = 32 * steps
    w = draw.exact_quantized("mxfp4", (16, k), seed)
    w = w.dequantize(torch.float64) / 2
    x = draw.integers((k,), seed + 1, 1, torch.float64)
    if float((w.abs() @ x.abs()).max()) >= 2**12 / 8:
        return
    assert_order_free(x, w, sum_bits(CUTE, "fp8"))
    assert torch.equal(dot(w, x), w @ x)


def test_sums_that_do_not_fit_lose_bits():
    """448 times 6 next to products of 1/4."""
    w = torch.full((1, 64), 0.25, dtype=torch.float64)
    w[0, 0] = 6.0
    x = torch.ones(64, dtype=torch.float64)
    x[0] = 448.0
    exact = w @ x
    got = dot(w, x)
    assert got != exact
    # a product loses less than the lowest bit kept
    assert (exact - got).abs() < 64 * 2.0 ** (11 - KEPT)
