"""Weights of more than 2^31 bytes: no offset of 32 bits reaches the last group."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cutemoe
from tests import strategies as draw
from tests.close import assert_same
from tests.gemm.cases import X, offsets_of, out_dtype
from tests.moe.cases import Target, values

G, N, K = 34, 32768, 4096
# gigabytes that a case takes while it packs
NEEDED = 24
GROUPS = (0, 15, 16, G - 1)


def weight(format: str, generator: torch.Generator) -> Any:
    """Random codes under scales 1/2 and 1; dense integers."""
    made: dict[str, Any] = {"generator": generator, "device": "cuda"}
    if format == "bf16":
        w = torch.empty(G, N, K, dtype=torch.bfloat16, device="cuda")
        for part in w:
            part.copy_(torch.randint(-4, 5, (N, K), **made, dtype=torch.int8))
        return w
    data = torch.randint(0, 256, (G, N, K // 2), **made, dtype=torch.uint8)
    scale = torch.randint(126, 128, (G, N, K // 128), **made, dtype=torch.uint8)
    if format == "mxfp4":
        return cutemoe.QuantizedTensor(data, scale.repeat_interleave(4, -1), format=format)
    halves = torch.exp2(scale.float() - 127).bfloat16()
    return cutemoe.QuantizedTensor(data, halves, format=format, group_size=128)


@pytest.mark.gpu
@pytest.mark.parametrize("prepared", [True, False], ids=["packed", "rows"])
@pytest.mark.parametrize("backend", ["cute", "triton", "reference"])
@pytest.mark.parametrize(("format", "kind"), [("mxfp4", "bf16"), ("int4", "fp8"), ("bf16", "bf16")])
def test_the_last_group_lies_beyond_32_bits(format, kind, backend, prepared):
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    if free < NEEDED * 1e9:
        pytest.skip(f"needs {NEEDED} GB of a card, {free / 1e9:.0f} are free")
    target = Target(backend, "cuda")
    w: Any = weight(format, torch.Generator("cuda").manual_seed(1))
    stored = w if format == "bf16" else w.data
    assert stored.nbytes > 2**31
    sizes = [3 if g in GROUPS else 0 for g in range(G)]
    x = draw.integers((sum(sizes), K), 2, 8, torch.float32).to(X[kind]).to("cuda")
    offsets = offsets_of(sizes).to("cuda")
    given = w
    if prepared:
        given = cutemoe.prepare_grouped_gemm(w, activations=kind, backend=backend)
        assert given.weight.data.nbytes > 2**31
    target.willing("grouped_gemm", x, given, offsets)
    got = cutemoe.grouped_gemm(x, given, offsets, backend=backend)
    want = torch.cat(
        [x[offsets[g] : offsets[g + 1]].double() @ values(w[g], torch.float64).T for g in GROUPS]
    )
    assert_same(got, want.to(out_dtype(x)))
