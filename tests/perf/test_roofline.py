import dataclasses

import moe_case
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from roofline import (
    Ceilings,
    Work,
    expected_distinct,
    expert_bytes,
    floor_us,
    gdn_work,
    gemm_work,
    memory_us,
    moe_work,
    state_bytes,
    weight_bits,
)
from workloads import WORKLOADS, GDNWorkload, GemmWorkload, MoEWorkload

from cutemoe import QuantizedTensor

CEILINGS = Ceilings(4.58, 4.24, 779.0, 1407.0, 1.0)


@given(
    experts=st.integers(2, 64),
    share=st.floats(0.02, 1.0),
    tokens=st.integers(1, 64),
    seed=st.integers(0, 2**31 - 1),
)
def test_expected_distinct_is_the_mean_of_uniform_routing(
    experts: int, share: float, tokens: int, seed: int
) -> None:
    top_k = max(1, round(share * experts))
    draws = 200
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(draws, tokens, experts, generator=g).topk(top_k).indices
    hit = torch.zeros(draws, experts).scatter_(1, ids.flatten(1), 1.0).sum(1)
    want = expected_distinct(experts, top_k, tokens)
    # the count has a variance below E/4, as experts exclude each other
    assert abs(float(hit.mean()) - want) <= 6 * (experts / 4 / draws) ** 0.5 + 1e-3


@given(experts=st.integers(1, 1024), top_k=st.integers(1, 32), tokens=st.integers(1, 4096))
def test_distinct_lies_between_top_k_and_all(experts: int, top_k: int, tokens: int) -> None:
    top_k = min(top_k, experts)
    d = expected_distinct(experts, top_k, tokens)
    assert top_k - 1e-6 <= d <= min(experts, top_k * tokens) + 1e-6
    assert d <= expected_distinct(experts, top_k, tokens + 1) + 1e-9


@pytest.mark.parametrize(
    ("weights", "group", "bits"),
    [
        ("mxfp4", None, 4.25),
        ("nvfp4", None, 4.5),
        ("int4", 128, 4.125),
        ("int4", 32, 4.5),
        ("bf16", None, 16),
    ],
)
def test_weight_bits(weights: str, group: int | None, bits: float) -> None:
    assert weight_bits(weights, group) == bits


@pytest.mark.parametrize(
    "name",
    ["headline", "headline_w4a8", "headline_nvfp4", "headline_mxfp4_w4a4", "gpt_oss_20b"],
)
def test_expert_bytes_are_those_of_a_real_layer(name: str) -> None:
    w = WORKLOADS[name]
    assert isinstance(w, MoEWorkload)
    small = dataclasses.replace(w, hidden=256, intermediate=128, experts=3)
    layer = moe_case.random_layer(small, torch.device("cpu"), torch.Generator().manual_seed(0))
    stored = 0
    for q in (layer.w13, layer.w2):
        assert isinstance(q, QuantizedTensor)
        stored += q.data.nbytes + q.scale.nbytes
    assert stored == 3 * expert_bytes(small)


def test_the_published_floor_of_the_headline_shape() -> None:
    # DESIGN.md, section 6: 17.5 us at one token, compute bound 1588 us at 4096
    w = WORKLOADS["headline"]
    assert isinstance(w, MoEWorkload)
    assert floor_us(moe_work(w, 1, 6), CEILINGS, matrix=True) == pytest.approx(17.5, rel=0.01)
    full = moe_work(w, 4096, 256)
    assert floor_us(full, CEILINGS, matrix=True) == pytest.approx(1588, rel=0.01)
    assert floor_us(full, CEILINGS, matrix=True) > memory_us(full, CEILINGS)


def test_both_gemms_are_the_layer() -> None:
    layer, g1, g2 = (WORKLOADS[name] for name in ("headline", "headline_g1", "headline_g2"))
    assert isinstance(layer, MoEWorkload)
    assert isinstance(g1, GemmWorkload) and isinstance(g2, GemmWorkload)
    whole, parts = moe_work(layer, 64, 200), [gemm_work(g, 64, 200) for g in (g1, g2)]
    assert whole.nbytes == sum(p.nbytes for p in parts)
    assert whole.flops == sum(p.flops for p in parts)


def test_fp8_products_are_held_to_the_fp8_rate() -> None:
    work = Work(0.0, 0.0, 1407e12 * 1e-6, fp8=True)
    assert floor_us(work, CEILINGS, matrix=True) == pytest.approx(1.0)
    without = dataclasses.replace(CEILINGS, fp8_tflop_s=None)
    assert floor_us(work, without, matrix=True) == pytest.approx(1407 / 779)


def test_reads_go_at_the_read_rate_and_writes_pair_with_reads() -> None:
    assert memory_us(Work(4.58e6, 0, 0), CEILINGS) == pytest.approx(1.0)
    assert memory_us(Work(2.12e6, 2.12e6, 0), CEILINGS) == pytest.approx(1.0)
    assert memory_us(Work(4.58e6 + 2.12e6, 2.12e6, 0), CEILINGS) == pytest.approx(2.0)


def test_gdn_bytes_by_mode() -> None:
    def work(mode: str, accepted: float = 0.0) -> Work:
        w = GDNWorkload("x", 32, 16, 128, "float32", 4, mode)
        assert state_bytes(w) == 2 << 20
        return gdn_work(w, 64, accepted)

    states = 64 * (2 << 20)
    decode, snapshots = work("decode"), work("snapshots")
    both, verify = work("snapshots+update"), work("verify", 3.0)
    assert snapshots.read_bytes == decode.read_bytes == both.read_bytes
    assert snapshots.write_bytes - decode.write_bytes == 3 * states
    assert both.write_bytes - snapshots.write_bytes == states
    # a verify writes no state: a fraction of what an update moves
    assert verify.nbytes < 0.6 * decode.nbytes
    assert work("verify", 4.0).read_bytes > verify.read_bytes


@given(batch=st.integers(1, 512), tokens=st.sampled_from((1, 2, 4, 8)))
def test_gdn_work_is_linear_in_sequences(batch: int, tokens: int) -> None:
    w = GDNWorkload("x", 64, 16, 128, "bfloat16", tokens, "decode")
    one, many = gdn_work(w, 1), gdn_work(w, batch)
    assert many.nbytes == batch * one.nbytes and many.flops == batch * one.flops
