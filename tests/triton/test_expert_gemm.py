"""The GEMM kernel alone: every format, odd shapes, tiles; exact inputs, compared bit for bit."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cutemoe.gemm.plan import GemmConfig, packed_layout
from cutemoe.gemm.weight import PackedWeight
from tests import strategies as draw
from tests.close import assert_same

grouped = pytest.importorskip(
    "cutemoe.triton_kernels.grouped_gemm", reason="triton is not installed"
)

FORMATS = (
    ("mxfp4", 32, "bf16"),
    ("mxfp4", 32, "fp16"),
    ("nvfp4", 16, "bf16"),
    ("nvfp4", 16, "fp16"),
    ("int4", 128, "bf16"),
    ("int4", 64, "fp16"),
    ("int4", 32, "bf16"),
    ("bf16", None, "bf16"),
    ("fp16", None, "fp16"),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
EXPERTS, TOP_K = 3, 2


def weights(format: str, group: int | None, n: int, k: int, seed: int):
    """[EXPERTS, n, k] whose products with small integers are exact."""
    if format in DTYPES:
        return draw.integers((EXPERTS, n, k), seed, 8, DTYPES[format])
    return draw.exact_quantized(format, (EXPERTS, n, k), seed, group_size=group)


def values(w) -> torch.Tensor:
    return w.double() if isinstance(w, torch.Tensor) else w.dequantize(torch.float64)


def tiles_of(experts: torch.Tensor, block_m: int):
    """Slots by expert, tiles (expert, first, rows) with one that is not live, and their number."""
    slots = torch.where(experts >= 0, experts, EXPERTS).argsort(stable=True)
    live = experts[experts >= 0]
    ends = torch.bincount(live, minlength=EXPERTS).cumsum(0).tolist()
    tiles = [
        [e, first, min(block_m, end - first)]
        for e, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
        for first in range(start, end, block_m)
    ]
    count = torch.tensor([len(tiles)], dtype=torch.int32)
    dead = [EXPERTS - 1, 0, block_m]
    return slots.int(), torch.tensor([*tiles, dead], dtype=torch.int32), count


def run(w, x, experts, config, *, layout="rows", bias=None, device="cpu", **changes):
    """y float32 [slots, n] in slot order, NaN where a slot has no expert; x by slot // TOP_K."""
    packed = PackedWeight.of(w, layout=layout)
    assert layout == "rows" or packed.scale is None or packed.layout == layout
    packed = packed.to(device)
    slots, tiles, count = (t.to(device) for t in tiles_of(experts, config.block_m))
    out = torch.full((len(experts), w.shape[1]), torch.nan, device=device)
    x, bias = x.to(device), None if bias is None else bias.to(device)
    spec = grouped.spec_of(packed, config, x, divide=TOP_K, scatter=True, bias=bias is not None)
    spec = replace(spec, **changes)
    rows = (slots, tiles, count)
    grouped.multiply(spec, config.warps, len(tiles), x, packed, out, rows, bias=bias)
    return out.cpu()


def expected(w, x, experts, bias=None):
    """The same in float64."""
    wide, y = values(w), torch.full((len(experts), w.shape[1]), torch.nan, dtype=torch.float64)
    for slot, e in enumerate(experts.tolist()):
        if e >= 0:
            y[slot] = wide[e] @ x[slot // TOP_K].double()
            if bias is not None:
                y[slot] += bias[e].double()
    return y.float()


def case(format, group, kind, n, k, tokens, seed):
    """Weights, x, expert of every slot (-1: none), bias."""
    k = -(-k // (group or 1)) * (group or 1)
    w = weights(format, group, n, k, seed)
    x = draw.integers((tokens, k), seed + 1, 4, DTYPES[kind])
    experts = torch.randint(-1, EXPERTS, (tokens * TOP_K,), generator=draw.generator(seed + 2))
    return w, x, experts, draw.integers((EXPERTS, n), seed + 3, 8, torch.float32)


@settings(max_examples=draw.examples(0.4))
@given(
    which=st.sampled_from(FORMATS),
    packed=st.booleans(),
    n=st.integers(1, 70),
    k=draw.multiples(16, 26),
    tokens=st.integers(1, 12),
    block_m=st.sampled_from([8, 16, 32]),
    seed=draw.seeds(),
)
def test_any_shape(which, packed, n, k, tokens, block_m, seed):
    format, group, kind = which
    w, x, experts, bias = case(format, group, kind, n, k, tokens, seed)
    layout = packed_layout(kind) if packed and group else "rows"
    config = GemmConfig(block_m, 32, 32, 4, 2)
    got = run(w, x, experts, config, layout=layout, bias=bias)
    assert_same(got, expected(w, x, experts, bias))


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(("format", "group", "kind"), FORMATS[:7])
def test_row_offsets_of_both_widths(format, group, kind, wide):
    w, x, experts, bias = case(format, group, kind, 40, 192, 5, 1)
    config = GemmConfig(16, 32, 128, 4, 2)
    got = run(w, x, experts, config, layout=packed_layout(kind), bias=bias, wide=wide)
    assert_same(got, expected(w, x, experts, bias))


@pytest.mark.parametrize(("format", "group", "kind"), FORMATS[:7])
def test_strided_x(format, group, kind):
    w, x, experts, _ = case(format, group, kind, 16, 128, 4, 5)
    padded = torch.full((4, x.shape[1] + 8), torch.nan, dtype=x.dtype)
    padded[:, : x.shape[1]] = x
    got = run(w, padded[:, : x.shape[1]], experts, GemmConfig(8, 16, 128, 4, 2))
    assert_same(got, expected(w, x, experts))


@pytest.mark.gpu
@pytest.mark.parametrize("block_m", [8, 16, 64])
@pytest.mark.parametrize(("format", "group", "kind"), FORMATS[:7])
def test_ptx_and_portable_decoding_agree(format, group, kind, block_m):
    """Random codes and scales, sums of one product each: any bit that differs shows."""
    k = 384
    data = draw.random_bytes((EXPERTS, 64, k // 2), 3)
    q: Any = weights(format, group, 64, k, 4)
    w = type(q)(data, q.scale, format=format, group_size=group)
    x = torch.eye(k, dtype=DTYPES[kind]).repeat(2, 1)
    experts = torch.arange(2 * k * TOP_K) % EXPERTS
    config = GemmConfig(block_m, 64, 128, 4, 3)
    got = [
        run(w, x, experts, config, layout=packed_layout(kind), device="cuda", portable=portable)
        for portable in (False, True)
    ]
    assert_same(got[0], got[1])
    assert_same(got[0], expected(w, x, experts))
