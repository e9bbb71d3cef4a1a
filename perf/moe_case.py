"""A mixture-of-experts layer as a case: routing and fused_moe on cold weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import measure
import torch
from roofline import Work, expected_distinct, expert_bytes, moe_work
from workloads import GemmWorkload, MoEWorkload

import cutemoe
from cutemoe.commands import oracle
from cutemoe.commands.oracle import Layer, Verdict

MEMORY = 60e9
CHECKED_ROWS = 8
MAX_CALLS = 32
# mean square of a random code, for weights that give outputs of unit variance
_MEAN_SQUARE = {"mxfp4": 8.5625, "nvfp4": 8.5625, "int4": 21.5}

# (x, logits, out) -> y
Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def calls_of(bytes_of_a_call: float, tokens: int) -> int:
    """Calls in a graph: fewer where one takes long, enough that no weight stays in L2."""
    usual = 8 if tokens <= 64 else 4 if tokens <= 1024 else 2
    need = math.ceil(measure.COLD_BYTES / bytes_of_a_call) + 1
    return min(max(usual, need), MAX_CALLS)


def bytes_of_a_call(w: MoEWorkload, tokens: int) -> float:
    """Weight bytes a call reads, on average; of skewed routing the least it can."""
    if w.skew == "none":
        return expected_distinct(w.experts, w.top_k, tokens) * expert_bytes(w)
    return w.top_k * expert_bytes(w)


def draw_logits(logits: torch.Tensor, skew: str, generator: torch.Generator) -> None:
    """Random logits [T, E] in place, with the preferences that MoEWorkload.skew names."""
    if skew == "zipf":
        # Gumbel noise: the largest k are k draws in proportion, without a repetition
        logits.exponential_(generator=generator).log_().neg_()
        rank = torch.arange(1, logits.shape[1] + 1, dtype=logits.dtype, device=logits.device)
        logits.sub_(rank.log_())
        return
    logits.normal_(generator=generator)
    if skew == "one":
        logits[:, 0] += 100.0


def sets_of(w: MoEWorkload, batches: tuple[int, ...], memory: float = MEMORY) -> int:
    """Copies of the layer that keep every batch cold."""
    layer = w.experts * expert_bytes(w)
    reads = [(bytes_of_a_call(w, b), b) for b in batches]
    return max(measure.copies(read, calls_of(read, b), layer, memory) for read, b in reads)


def random_layer(w: MoEWorkload, device: torch.device, generator: torch.Generator) -> Layer:
    """A layer of random codes whose outputs have about the variance of its inputs."""
    wide = 2 * w.intermediate
    w13 = random_weight(w, (w.experts, wide, w.hidden), device, generator)
    w2 = random_weight(w, (w.experts, w.hidden, w.intermediate), device, generator)
    b13 = b2 = None
    if w.biases:
        b13, b2 = (
            torch.randn(w.experts, n, generator=generator, device=device) * 0.1
            for n in (wide, w.hidden)
        )
    return Layer(w13, w2, b13, b2, w.gate_up, w.activations, w.swiglu)


def random_weight(
    w: MoEWorkload | GemmWorkload,
    shape: tuple[int, int, int],
    device: torch.device,
    generator: torch.Generator,
) -> oracle.Weight:
    """Random codes and scales [E, N, Kdim]; dense bf16 where the workload is not quantized."""
    e, n, k = shape
    if w.weights == "bf16":
        dense = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        return dense.mul_(k**-0.5)
    made: dict[str, Any] = {"generator": generator, "device": device}
    data = torch.randint(0, 256, (e, n, k // 2), dtype=torch.uint8, **made)
    target = 1.0 / math.sqrt(k * _MEAN_SQUARE[w.weights])
    if w.weights == "mxfp4":
        middle = 127 + round(math.log2(target))
        blocks = (e, n, k // 32)
        scale = torch.randint(middle - 1, middle + 1, blocks, dtype=torch.uint8, **made)
        return cutemoe.QuantizedTensor(data, scale, format="mxfp4")
    group = w.group_size or (16 if w.weights == "nvfp4" else 128)
    scale = torch.rand(e, n, k // group, **made).add_(0.5)
    if w.weights == "int4":
        scale = scale.mul_(target).to(torch.bfloat16)
        return cutemoe.QuantizedTensor(data, scale, format="int4", group_size=group)
    over = torch.full((e,), target, device=device)
    return cutemoe.QuantizedTensor(data, scale.to(torch.float8_e4m3fn), over, format="nvfp4")


def prepare(layer: Layer, backend: str, device: torch.device) -> Any:
    """The layer as `cutemoe.prepare_moe` holds it."""
    return cutemoe.prepare_moe(
        layer.w13,
        layer.w2,
        layer.b13,
        layer.b2,
        activations=layer.activations,
        gate_up=layer.gate_up,
        device=device,
        backend=backend,
    )


def peer_run(
    peer: Any, prepared: Any, x: torch.Tensor, logits: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """A peer's layer; it returns a tensor of its own."""
    return peer.run_layer(prepared, x, logits)


def activation(w: MoEWorkload) -> cutemoe.SwiGLU:
    """The gated unit of a workload."""
    alpha, beta, limit = w.swiglu
    return cutemoe.SwiGLU(alpha=alpha, beta=beta, limit=limit)


def ours(w: MoEWorkload, prepared: Any, tokens: int, backend: str) -> Run:
    """Routing and layer through the public API, allocating nothing but ids and weights."""
    gated = activation(w)
    workspace = cutemoe.Workspace.for_moe(prepared, tokens, w.top_k)

    def run(x: torch.Tensor, logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        ids, weights = cutemoe.route(logits, w.top_k, **dict(w.routing))
        return cutemoe.fused_moe(
            x,
            prepared,
            ids,
            weights,
            activation=gated,
            out=out,
            workspace=workspace,
            backend=backend,
        )

    return run


class MoECase:
    """Several calls, each with its own tokens, logits and, in rotation, layer.

    Args:
        w: the workload.
        tokens: batch.
        layer: the stored form of what runs[0] computes with, for the gate.
        runs: one callable per copy of the layer.
    """

    def __init__(
        self,
        w: MoEWorkload,
        tokens: int,
        layer: Layer,
        runs: list[Run],
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        self.w, self.tokens, self.layer, self.runs = w, tokens, layer, runs
        self.calls = calls_of(bytes_of_a_call(w, tokens), tokens)
        self.generator = generator
        self.x, self.logits, self.out, self.y = [], [], [], []
        for _ in range(self.calls):
            x = torch.randn(tokens, w.hidden, generator=generator, device=device)
            self.x.append(x.to(torch.bfloat16))
            self.logits.append(torch.empty(tokens, w.experts, device=device))
            self.out.append(torch.empty_like(self.x[-1]))
        self.refresh()

    def body(self) -> None:
        """Every call once."""
        self.y = [
            self.runs[i % len(self.runs)](self.x[i], self.logits[i], self.out[i])
            for i in range(self.calls)
        ]

    def refresh(self) -> None:
        """New routing for every call."""
        for logits in self.logits:
            draw_logits(logits, self.w.skew, self.generator)

    def route(self, call: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Experts and weights that a call uses."""
        return cutemoe.route(self.logits[call], self.w.top_k, **dict(self.w.routing))

    def check(self) -> Verdict:
        """Some rows of one call, with the real batch, against float64."""
        self.out[0].fill_(math.nan)
        y = self.runs[0](self.x[0], self.logits[0], self.out[0])
        if not torch.isfinite(y).all():
            return Verdict(math.nan, 0.0)
        ids, weights = self.route(0)
        count = min(CHECKED_ROWS, self.tokens)
        rows = torch.linspace(0, self.tokens - 1, count, device=y.device).long()
        exact, path = oracle.moe(self.x[0][rows], self.layer, ids[rows], weights[rows])
        return oracle.judge(y[rows], exact, path)

    def work(self) -> Work:
        """Bytes of the experts really drawn by the last replay, mean over its calls."""
        works = [
            moe_work(self.w, self.tokens, self.route(i)[0].unique().numel())
            for i in range(self.calls)
        ]
        return measure.mean_work(works)

    def confirm(self) -> str | None:
        """A replayed result must have the bits of an eager call on the same inputs."""
        replayed = self.y[0].clone()
        again = self.runs[0](self.x[0], self.logits[0], torch.empty_like(self.out[0]))
        same = torch.equal(replayed, again)
        return None if same else "the replayed graph and an eager call differ"


def explain(case: MoECase, prepared: Any, backend: str) -> Any:
    """What `cutemoe.explain` says of a call of the case."""
    ids, weights = case.route(0)
    gated = activation(case.w)
    return cutemoe.explain(
        "fused_moe", case.x[0], prepared, ids, weights, activation=gated, backend=backend
    )
