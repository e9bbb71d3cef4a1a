"""A grouped GEMM as a case: rows of random routing, cold weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import measure
import moe_case
import torch
from roofline import Work, expected_distinct, gemm_work, group_bytes
from workloads import GemmWorkload

import cutemoe
from cutemoe.commands import oracle
from cutemoe.commands.oracle import Verdict

CHECKED_ROWS = 16

# (x, offsets, x_scale, out) -> y
Run = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None", torch.Tensor], torch.Tensor]


def bytes_of_a_call(w: GemmWorkload, tokens: int) -> float:
    """Weight bytes a call reads, on average."""
    return expected_distinct(w.experts, w.top_k, tokens) * group_bytes(w)


def sets_of(w: GemmWorkload, batches: tuple[int, ...], memory: float) -> int:
    """Copies of the weights that keep every batch cold."""
    reads = [(bytes_of_a_call(w, b), b) for b in batches]
    return max(
        measure.copies(read, moe_case.calls_of(read, b), w.experts * group_bytes(w), memory)
        for read, b in reads
    )


def random_weight(
    w: GemmWorkload, device: torch.device, generator: torch.Generator
) -> oracle.Weight:
    """Weights [experts, n, k]."""
    return moe_case.random_weight(w, (w.experts, w.n, w.k), device, generator)


def ours(w: GemmWorkload, weight: oracle.Weight, backend: str) -> Run:
    """The call through the public API."""
    prepared = cutemoe.prepare_grouped_gemm(weight, activations=w.activations, backend=backend)

    def run(
        x: torch.Tensor, offsets: torch.Tensor, x_scale: torch.Tensor | None, out: torch.Tensor
    ) -> torch.Tensor:
        return cutemoe.grouped_gemm(x, prepared, offsets, x_scale=x_scale, out=out, backend=backend)

    return run


class GemmCase:
    """Several calls, each with its own rows and, in rotation, weights.

    Args:
        w: the workload.
        tokens: batch.
        weight: what runs[0] computes with, for the gate.
        runs: one callable per copy of the weights.
    """

    def __init__(
        self,
        w: GemmWorkload,
        tokens: int,
        weight: oracle.Weight,
        runs: list[Run],
        device: torch.device,
        generator: torch.Generator,
    ) -> None:
        self.w, self.tokens, self.weight, self.runs = w, tokens, weight, runs
        self.calls = moe_case.calls_of(bytes_of_a_call(w, tokens), tokens)
        self.generator = generator
        rows = tokens * w.top_k
        self.x, self.x_scale, self.offsets, self.out = [], [], [], []
        for _ in range(self.calls):
            x = torch.randn(rows, w.k, generator=generator, device=device)
            if w.activations == "fp8":
                q = cutemoe.quantize(x, "fp8")
                self.x.append(q.data)
                self.x_scale.append(q.scale)
            else:
                self.x.append(x.to(torch.bfloat16))
                self.x_scale.append(None)
            self.offsets.append(torch.zeros(w.experts + 1, dtype=torch.int32, device=device))
            self.out.append(torch.empty(rows, w.n, dtype=torch.bfloat16, device=device))
        self.y = list(self.out)
        self.refresh()

    def _call(self, i: int, out: torch.Tensor) -> torch.Tensor:
        run = self.runs[i % len(self.runs)]
        return run(self.x[i], self.offsets[i], self.x_scale[i], out)

    def body(self) -> None:
        """Every call once."""
        self.y = [self._call(i, self.out[i]) for i in range(self.calls)]

    def refresh(self) -> None:
        """New routing, and with it new numbers of rows of every group."""
        device = self.offsets[0].device
        for offsets in self.offsets:
            keys = torch.rand(self.tokens, self.w.experts, generator=self.generator, device=device)
            ids = keys.topk(self.w.top_k).indices.flatten()
            counts = torch.zeros_like(offsets[1:]).index_add_(
                0, ids, torch.ones_like(ids, dtype=torch.int32)
            )
            offsets[1:] = counts.cumsum(0)

    def check(self) -> Verdict:
        """Some rows of one call, with the real batch, against float64."""
        self.out[0].fill_(math.nan)
        y = self._call(0, self.out[0])
        if not torch.isfinite(y).all():
            return Verdict(math.nan, 0.0)
        count = min(CHECKED_ROWS, len(y))
        rows = torch.linspace(0, len(y) - 1, count, device=y.device).long()
        owners = torch.searchsorted(self.offsets[0], rows.to(torch.int32), right=True) - 1
        exact = torch.empty(count, self.w.n, dtype=torch.float64, device=y.device)
        path = torch.empty_like(exact, dtype=torch.float32)
        for i, (row, group) in enumerate(zip(rows.tolist(), owners.tolist(), strict=True)):
            values, factor = oracle.decoded(self.weight, group)
            for out in (exact, path):
                x = self.x[0][row].to(out.dtype)
                scale = self.x_scale[0]
                x = x if scale is None else x * scale[row].to(out.dtype)
                sums = values.to(out.dtype) @ x
                out[i] = sums if factor is None else sums * factor.to(out.dtype)
        return oracle.judge(y[rows], exact, path.to(y.dtype))

    def work(self) -> Work:
        """Bytes of the groups that had rows in the last replay, mean over its calls."""
        drawn = [int((offsets.diff() > 0).sum()) for offsets in self.offsets]
        return measure.mean_work([gemm_work(self.w, self.tokens, d) for d in drawn])

    def confirm(self) -> str | None:
        """A replayed result must have the bits of an eager call on the same inputs."""
        replayed = self.y[0].clone()
        same = torch.equal(replayed, self._call(0, torch.empty_like(replayed)))
        return None if same else "the replayed graph and an eager call differ"


def explain(case: GemmCase, backend: str) -> Any:
    """What `cutemoe.explain` says of a call of the case."""
    scale = case.x_scale[0]
    return cutemoe.explain(
        "grouped_gemm", case.x[0], case.weight, case.offsets[0], x_scale=scale, backend=backend
    )
