"""What the demo runs: calls of public functions with an oracle each, at sizes of real models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch

import cutemoe
from cutemoe.commands import oracle
from cutemoe.commands.clock import Work
from cutemoe.commands.oracle import Layer, Steps, Verdict
from cutemoe.formats import QuantizedTensor

# buffer sets in rotation, so that what a timed call reads is not in L2
SETS = 4


class Case(Protocol):
    """One row of the demo for each back end.

    Attributes:
        op: name of the public function.
        title: what it runs, for the table.
        work: what a call cannot avoid.
    """

    op: str
    title: str

    @property
    def work(self) -> Work:
        """Mean over the calls."""
        ...

    def explain(self) -> Any:
        """What `cutemoe.explain` says of the call."""
        ...

    def check(self, backend: str) -> Verdict:
        """Runs the call and compares it with its oracle."""
        ...

    def calls(self, backend: str) -> list[Callable[[], torch.Tensor]]:
        """Calls to time together, on buffers in rotation."""
        ...


@dataclass(frozen=True)
class Shape:
    """Sizes of an expert layer and its call."""

    hidden: int
    intermediate: int
    experts: int
    top_k: int
    tokens: int


class MoECase:
    """Routing and expert layer; quantized weights of random codes."""

    op = "fused_moe"

    def __init__(
        self,
        title: str,
        shape: Shape,
        format: str,
        device: torch.device,
        *,
        activations: str = "bf16",
        gpt_oss: bool = False,
    ) -> None:
        self.title, self.shape, self.device = title, shape, device
        s, sets = shape, SETS if device.type == "cuda" else 1
        self.activation = cutemoe.SwiGLU(1.702, 1.0, 7.0) if gpt_oss else cutemoe.SwiGLU()
        self.method = "topk_softmax" if gpt_oss else "softmax_topk"
        self.layers = [self._layer(s, format, activations, gpt_oss, device) for _ in range(sets)]
        self.activations = activations
        self.prepared: dict[str, list[cutemoe.PreparedMoE]] = {}
        moe = self._moes("reference")[0]
        self.workspace = cutemoe.Workspace.for_moe(moe, s.tokens, s.top_k)
        self.x = torch.randn(s.tokens, s.hidden, device=device).to(torch.bfloat16)
        self.logits = torch.randn(sets, s.tokens, s.experts, device=device)
        self.out = torch.empty(sets, *self.x.shape, dtype=torch.bfloat16, device=device)

    def _moes(self, backend: str) -> list[cutemoe.PreparedMoE]:
        """The layers with their weights where a back end wants them."""
        if backend not in self.prepared:
            self.prepared[backend] = [
                cutemoe.prepare_moe(
                    w.w13,
                    w.w2,
                    w.b13,
                    w.b2,
                    activations=self.activations,
                    gate_up=w.gate_up,
                    backend=backend,
                )
                for w in self.layers
            ]
        return self.prepared[backend]

    @staticmethod
    def _layer(
        s: Shape, format: str, activations: str, gpt_oss: bool, device: torch.device
    ) -> Layer:
        w13 = random_weight((s.experts, 2 * s.intermediate, s.hidden), format, device)
        w2 = random_weight((s.experts, s.hidden, s.intermediate), format, device)
        if not gpt_oss:
            return Layer(w13, w2, activations=activations)
        b13 = torch.randn(s.experts, 2 * s.intermediate, device=device)
        b2 = torch.randn(s.experts, s.hidden, device=device)
        return Layer(w13, w2, b13, b2, "interleaved", activations, (1.702, 1.0, 7.0))

    def _run(self, backend: str, i: int = 0) -> torch.Tensor:
        ids, weights = cutemoe.route(self.logits[i], self.shape.top_k, method=self.method)
        return cutemoe.fused_moe(
            self.x,
            self._moes(backend)[i],
            ids,
            weights,
            activation=self.activation,
            out=self.out[i],
            workspace=self.workspace,
            backend=backend,
        )

    @cached_property
    def _routing(self) -> tuple[torch.Tensor, torch.Tensor]:
        return cutemoe.route(self.logits[0], self.shape.top_k, method=self.method)

    @cached_property
    def _expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        return oracle.moe(self.x, self.layers[0], *self._routing)

    def check(self, backend: str) -> Verdict:
        """The whole output of a call."""
        self.out[0].fill_(torch.nan)
        return oracle.judge(self._run(backend), *self._expected)

    def calls(self, backend: str) -> list[Callable[[], torch.Tensor]]:
        """Two calls a layer."""
        n = len(self.layers)
        return [lambda i=i: self._run(backend, i % n) for i in range(2 * n)]

    def explain(self) -> Any:
        """Which back ends run the layer, each with weights in the layout that it asks for."""

        def asked(backend: str) -> Any:
            moe = self._moes(backend)[0]
            args = (self.x, moe, *self._routing)
            return cutemoe.explain(self.op, *args, activation=self.activation)

        found = asked("reference")
        reasons = []
        for r in cutemoe.backends(self.op, self.device):
            if r.reason is None:
                r = next(x for x in asked(r.name).reasons if x.name == r.name)
            reasons.append(r)
        return replace(found, reasons=tuple(reasons))

    @property
    def work(self) -> Work:
        """Weights of the experts drawn, mean over the layers, and both products."""
        s, distinct = self.shape, 0
        for logits in self.logits:
            ids, _ = cutemoe.route(logits, s.top_k, method=self.method)
            distinct += ids.unique().numel()
        w13, w2 = self.layers[0].w13, self.layers[0].w2
        read = distinct / len(self.layers) * (w13.nbytes + w2.nbytes) / s.experts
        return Work(read, 0.0, 6.0 * s.tokens * s.top_k * s.hidden * s.intermediate)


def random_weight(
    shape: tuple[int, int, int], format: str, device: torch.device
) -> QuantizedTensor:
    """Random 4-bit codes and scales [E, N, Kdim], values of variance about 1 / Kdim."""
    e, n, k = shape
    # the rms of a random e2m1 code is 2.93
    target = k**-0.5 / 2.93
    words = torch.empty(e * n * k // 16, dtype=torch.int64, device=device).random_(
        -(2**63), 2**63 - 1
    )
    data = words.view(torch.uint8).view(e, n, k // 2)
    if format == "mxfp4":
        middle = 127 + round(torch.tensor(target).log2().item())
        bytes_ = (e, n, k // 32)
        scale = torch.randint(middle - 1, middle + 2, bytes_, dtype=torch.uint8, device=device)
        return QuantizedTensor(data, scale, format="mxfp4")
    if format == "int4":
        # the rms of a random int4 code is 4.64
        scale = torch.rand(e, n, k // 128, device=device).add_(0.5).mul_(k**-0.5 / 4.64)
        return QuantizedTensor(data, scale.to(torch.bfloat16), format=format, group_size=128)
    scale = torch.rand(e, n, k // 16, device=device).add_(0.5).to(torch.float8_e4m3fn)
    over = torch.full((e,), target, device=device)
    return QuantizedTensor(data, scale, over, format="nvfp4")


@dataclass(frozen=True)
class Heads:
    """Sizes of a gated delta net call."""

    sequences: int
    v_heads: int
    q_heads: int
    size: int


class GDNCase:
    """One decode step, or with `tokens` above 1 a draft window verified after another one."""

    def __init__(self, title: str, heads: Heads, tokens: int, device: torch.device) -> None:
        self.title, self.heads, self.tokens = title, heads, tokens
        self.verify = tokens > 1
        self.op = "gdn_verify" if self.verify else "gdn_decode"
        h, d = heads, heads.size
        b, sets = h.sequences, SETS if device.type == "cuda" else 1

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device).to(torch.bfloat16)

        a_log = torch.rand(h.v_heads, device=device) * 3.0 - 1.0
        dt_bias = torch.randn(h.v_heads, device=device) - 2.0
        self.windows = [
            Steps(
                randn(b, tokens, h.q_heads, d),
                randn(b, tokens, h.q_heads, d),
                randn(b, tokens, h.v_heads, d),
                randn(b, tokens, h.v_heads),
                randn(b, tokens, h.v_heads),
                a_log,
                dt_bias,
            )
            for _ in range(2)
        ]
        self.start = torch.randn(b, h.v_heads, d, d, device=device) * d**-0.5
        self.states = [self.start.clone() for _ in range(sets)]
        self.slots = torch.randperm(b, device=device).to(torch.int32)
        self.none = torch.zeros(b, dtype=torch.int32, device=device)
        self.accepted = torch.randint(0, tokens + 1, (b,), dtype=torch.int32, device=device)
        self.drafts = [self._draft(device) for _ in range(sets)] if self.verify else []

    def _draft(self, device: torch.device) -> cutemoe.GDNDraft:
        h = self.heads
        sizes = (h.sequences, self.tokens, h.q_heads, h.v_heads, h.size)
        return cutemoe.GDNDraft.allocate(*sizes, device=device, dtype=torch.bfloat16)

    def _arguments(self, window: int, backend: str, i: int, state: torch.Tensor) -> dict[str, Any]:
        s = self.windows[window]
        named: dict[str, Any] = {
            **{"a": s.a, "b": s.b, "A_log": s.A_log, "dt_bias": s.dt_bias},
            **{"state": state, "state_indices": self.slots, "backend": backend},
        }
        if self.verify:
            named["draft"] = self.drafts[i]
            named["num_accepted"] = self.accepted if window else self.none
        return named

    def _run(self, window: int, backend: str, i: int, state: torch.Tensor) -> torch.Tensor:
        s = self.windows[window]
        function = cutemoe.gdn_verify if self.verify else cutemoe.gdn_decode
        return function(s.q, s.k, s.v, **self._arguments(window, backend, i, state))

    @cached_property
    def _expected(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(float64, torch's own path) of every result, in the order of `_results`."""
        slots = self.slots.long()
        found = []
        for dtype in (torch.float64, torch.float32):
            state = self.start[slots].to(dtype)
            first, after = oracle.gdn(self.windows[0], state, dtype)
            if not self.verify:
                found.append((first, after[:, -1]))
                continue
            prefixes = torch.cat((state[:, None], after.to(dtype)), 1)
            taken = prefixes[torch.arange(len(slots), device=slots.device), self.accepted.long()]
            found.append((first, oracle.gdn(self.windows[1], taken, dtype)[0], taken))
        return list(zip(*found, strict=True))

    def _results(self, backend: str) -> tuple[torch.Tensor, ...]:
        """Outputs and states, those by sequence."""
        state = self.start.clone()
        slots = self.slots.long()
        first = self._run(0, backend, 0, state)
        if not self.verify:
            return first, state[slots]
        second = self._run(1, backend, 0, state)
        # drops the second window, after folding what was accepted of the first
        self.drafts[0].flush(state, self.none, self.slots, backend=backend)
        return first, second, state[slots]

    def check(self, backend: str) -> Verdict:
        """Outputs and final states of all sequences."""
        results = self._results(backend)
        return oracle.worst(
            [oracle.judge(r, *want) for r, want in zip(results, self._expected, strict=True)]
        )

    def calls(self, backend: str) -> list[Callable[[], torch.Tensor]]:
        """One call a state pool."""
        return [
            lambda i=i, state=state: self._run(int(self.verify), backend, i, state)
            for i, state in enumerate(self.states)
        ]

    def explain(self) -> Any:
        """What `cutemoe.explain` says of the call."""
        s = self.windows[0]
        return cutemoe.explain(self.op, s.q, s.k, s.v, **self._arguments(0, "auto", 0, self.start))

    @property
    def work(self) -> Work:
        """The state read, and by a decode written, with inputs and outputs of every token."""
        s = self.windows[0]
        inputs = sum(t.nbytes for t in (s.q, s.k, s.v, s.a, s.b))
        written = 0 if self.verify else self.start.nbytes
        return Work(self.start.nbytes + inputs, written + s.v.nbytes)


GPT_OSS_20B = (2880, 2880, 32, 4)
QWEN3_30B = (2048, 768, 128, 8)
QWEN3_NEXT = (32, 16, 128)


def full_size(device: torch.device) -> list[Callable[[], Case]]:
    """The cases at the sizes of the models; few tokens where only a CPU computes them."""
    gpu = device.type == "cuda"
    tokens, sequences = (16, 64) if gpu else (4, 4)
    heads = Heads(sequences, *QWEN3_NEXT)
    return [
        lambda: MoECase(
            f"gpt-oss-20b layer, MXFP4 x BF16, {tokens} tokens",
            Shape(*GPT_OSS_20B, tokens),
            "mxfp4",
            device,
            gpt_oss=True,
        ),
        lambda: MoECase(
            f"Qwen3-30B-A3B layer, NVFP4 x NVFP4, {tokens} tokens",
            Shape(*QWEN3_30B, tokens),
            "nvfp4",
            device,
            activations="nvfp4",
        ),
        lambda: GDNCase(f"Qwen3-Next step, {sequences} sequences", heads, 1, device),
        lambda: GDNCase(f"Qwen3-Next verify, {sequences} x 4 tokens", heads, 4, device),
    ]


def small_size(device: torch.device) -> list[Callable[[], Case]]:
    """The same cases, small enough for an interpreter."""
    shape, heads = Shape(64, 32, 4, 2, 3), Heads(2, 4, 2, 32)
    return [
        lambda: MoECase("small, MXFP4 x BF16", shape, "mxfp4", device, gpt_oss=True),
        lambda: MoECase("small, NVFP4 x NVFP4", shape, "nvfp4", device, activations="nvfp4"),
        lambda: GDNCase("small step", heads, 1, device),
        lambda: GDNCase("small verify", heads, 4, device),
    ]
