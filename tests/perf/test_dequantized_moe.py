"""The baseline of decoded weights: its steps against cutemoe.formats, the whole against float64."""

from __future__ import annotations

import dataclasses

import moe_case
import pytest
import torch
from baselines import dequantized_moe as peer
from hypothesis import given
from hypothesis import strategies as st
from workloads import WORKLOADS, MoEWorkload

import cutemoe
from cutemoe.commands import oracle
from tests.close import assert_same

FORMATS = pytest.mark.parametrize("format", peer.GROUP)
TINY = MoEWorkload("tiny", 64, 96, 6, 2)
SPREAD = torch.tensor([2.0**n for n in (-100, -60, -20, -9, 0, 3, 40, 100)])


def workload(format: str, **kwargs: object) -> MoEWorkload:
    return dataclasses.replace(TINY, weights=format, activations=format, **kwargs)  # type: ignore[arg-type]


def test_it_says_what_it_does_not_run() -> None:
    layers = {n: w for n, w in WORKLOADS.items() if isinstance(w, MoEWorkload)}
    runs = {n for n, w in layers.items() if peer.refuse(w) is None}
    assert runs == {n for n in layers if n.endswith("_w4a4")} and len(runs) == 4
    assert peer.refuse(workload("mxfp4", biases=True)) == "layers without biases only"
    assert "both mxfp4, got mxfp4 and bf16" in (peer.refuse(TINY) or "")


def test_without_a_card_it_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for interpret, why in ((True, None), (False, "needs a CUDA device, or TRITON_INTERPRET=1")):
        monkeypatch.setattr(peer.knobs.runtime, "interpret", interpret)
        assert peer.unavailable() == why
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, runs in (((9, 0), True), ((8, 0), False), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda c=capability: c)
        assert (peer.unavailable() is None) == runs


@FORMATS
@given(seed=st.integers(0, 2**31 - 1))
def test_rows_are_rounded_as_the_format_says(device: torch.device, format: str, seed: int) -> None:
    """Every bit, over the range of both scales, with ties, zeros and signs."""
    g = torch.Generator().manual_seed(seed)
    group = peer.GROUP[format]
    # more columns than a program has, the last block of them not full
    shape = (8, peer._COLUMNS + 3 * group)
    wide = torch.randn(shape, generator=g) * SPREAD[:, None]
    ties = torch.randint(-48, 49, shape, generator=g) / 8
    ties[:, ::group] = 6.0
    for x in (wide, wide.bfloat16(), ties, ties * SPREAD[:, None], torch.zeros(shape)):
        one = 1.0 if format == "nvfp4" else None
        want = cutemoe.quantize(x, format, global_scale=one).dequantize()
        assert_same(want.bfloat16().float(), want)
        got = peer.rounded(x.to(device), format).cpu()
        assert torch.equal(got.float(), want)


@FORMATS
def test_weights_are_decoded_of_experts_with_rows_alone(device: torch.device, format: str) -> None:
    w = workload(format, intermediate=160)
    g = torch.Generator().manual_seed(3)
    q = moe_case.random_weight(w, (6, 320, 64), torch.device("cpu"), g)
    assert isinstance(q, cutemoe.QuantizedTensor)
    # every scale whose products are normal numbers
    q.scale.view(torch.uint8).random_(*((3, 250) if format == "mxfp4" else (0, 127)), generator=g)
    plain = cutemoe.QuantizedTensor(q.data, q.scale, format=format).dequantize(torch.bfloat16)
    ends = torch.tensor([0, 2, 2, 5, 6, 6], dtype=torch.int32)
    got = peer.decoded_where(q.to(device), ends.to(device)).cpu()
    for e in (1, 3, 4):
        assert_same(got[e], plain[e])
    rows = torch.tensor([0, 3, 3, 5])
    assert_same(peer.decoded(q.to(device), rows.to(device)).cpu(), plain[rows])


def test_experts_without_rows_are_left_alone(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = cutemoe.quantize(torch.randn(3, 32, 64), "mxfp4").to(device)
    ends = torch.tensor([0, 1, 1], dtype=torch.int32).to(device)
    sevens = torch.full((3, 32, 64), 7.0, dtype=torch.bfloat16, device=device)
    monkeypatch.setattr(peer.torch, "empty", lambda *_, **__: sevens)
    got = peer.decoded_where(q, ends)
    assert bool((got[[0, 2]] == 7).all()) and not bool((got[1] == 7).all())


def layer_of(w: MoEWorkload, g: torch.Generator, device: torch.device) -> oracle.Layer:
    layer = moe_case.random_layer(w, torch.device("cpu"), g)
    w13, w2 = (q.to(device) for q in (layer.w13, layer.w2))
    return dataclasses.replace(layer, w13=w13, w2=w2)


@FORMATS
@pytest.mark.parametrize("gate_up", ["gate_up", "up_gate", "interleaved"])
@pytest.mark.parametrize("swiglu", [(1.0, 0.0, None), (1.702, 1.0, 2.0)], ids=str)
def test_the_layer_passes_the_gate(
    device: torch.device,
    format: str,
    gate_up: str,
    swiglu: tuple[float, float, float | None],
) -> None:
    w = workload(format, gate_up=gate_up, swiglu=swiglu)
    g = torch.Generator().manual_seed(1)
    layer = layer_of(w, g, device)
    # few slots, and many
    for tokens in (1, 40):
        x = torch.randn(tokens, w.hidden, generator=g).to(device, torch.bfloat16)
        logits = torch.randn(tokens, w.experts, generator=g).to(device)
        y = peer.run_layer(peer.prepare_layer(w, layer), x, logits)
        ids, weights = cutemoe.route(logits, w.top_k)
        exact, path = oracle.moe(x, layer, ids, weights)
        assert oracle.judge(y, exact, path).ok
        alpha, beta, limit = swiglu
        wrong = dataclasses.replace(w, swiglu=(alpha, beta + 0.25, limit))
        y = peer.run_layer(peer.prepare_layer(wrong, layer), x, logits)
        assert not oracle.judge(y, exact, path).ok


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [9, 90])
@FORMATS
def test_a_graph_replays_with_new_routing(format: str, tokens: int) -> None:
    cuda = torch.device("cuda")
    w = workload(format, hidden=512, intermediate=256)
    g = torch.Generator().manual_seed(1)
    p = peer.prepare_layer(w, layer_of(w, g, cuda))
    x = torch.randn(tokens, w.hidden, generator=g).to(cuda, torch.bfloat16)
    logits = torch.randn(tokens, w.experts, generator=g).to(cuda)
    peer.run_layer(p, x, logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = peer.run_layer(p, x, logits)
    for _ in range(3):
        logits.copy_(torch.randn(tokens, w.experts, generator=g))
        graph.replay()
        assert_same(y, peer.run_layer(p, x, logits))
