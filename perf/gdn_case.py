"""Gated delta net steps as a case: cold states in rotation, slots in random order."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import measure
import torch
from roofline import Work, gdn_work, state_bytes
from workloads import GDNWorkload

import cutemoe
from cutemoe.commands import oracle
from cutemoe.commands.oracle import Steps, Verdict

MEMORY = 60e9
MAX_SETS = 64
# calls in a graph, so that its start is lost among them
MIN_CALLS = 16
CHECKED_ROWS = 4


@dataclass(frozen=True, eq=False)
class Inputs:
    """Tensors of one call: `snapshots` and `draft` are None where the mode has none.

    state [B, HV, D, D] (K last) is indexed by slots int32 [B]; accepted int32 [B].
    """

    steps: Steps
    state: torch.Tensor
    slots: torch.Tensor
    out: torch.Tensor
    snapshots: torch.Tensor | None
    draft: Any
    accepted: torch.Tensor | None


Run = Callable[[Inputs], torch.Tensor]


def sets_of(w: GDNWorkload, sequences: int, memory: float = MEMORY) -> int:
    """Buffer sets in rotation."""
    work = gdn_work(w, sequences)
    size = work.nbytes + sequences * state_bytes(w)
    return measure.copies(work.nbytes, MAX_SETS, size, memory)


def random_steps(
    w: GDNWorkload, sequences: int, device: torch.device, generator: torch.Generator
) -> Steps:
    """Inputs of ordinary size, gates that remember and forget."""

    def randn(*shape: int) -> torch.Tensor:
        t = torch.randn(*shape, generator=generator, device=device)
        return t.to(torch.bfloat16)

    b, t, d = sequences, w.tokens, w.head_dim
    a_log = torch.rand(w.v_heads, generator=generator, device=device).mul_(3.0).sub_(1.0)
    dt_bias = torch.randn(w.v_heads, generator=generator, device=device).sub_(2.0)
    return Steps(
        randn(b, t, w.q_heads, d),
        randn(b, t, w.q_heads, d),
        randn(b, t, w.v_heads, d),
        randn(b, t, w.v_heads),
        randn(b, t, w.v_heads),
        a_log,
        dt_bias,
    )


def random_inputs(
    w: GDNWorkload, sequences: int, device: torch.device, generator: torch.Generator
) -> Inputs:
    """One set of buffers."""
    dtype = torch.float32 if w.state == "float32" else torch.bfloat16
    one = (w.v_heads, w.head_dim, w.head_dim)
    state = torch.randn(sequences, *one, generator=generator, device=device, dtype=dtype)
    slots = torch.randperm(sequences, generator=generator, device=device).to(torch.int32)
    snapshots = draft = accepted = None
    if w.mode.startswith("snapshots"):
        snapshots = torch.empty(sequences, w.tokens, *one, dtype=dtype, device=device)
    if w.mode == "verify":
        sizes = (sequences, w.tokens, w.q_heads, w.v_heads, w.head_dim)
        draft = cutemoe.GDNDraft.allocate(*sizes, device=device, dtype=torch.bfloat16)
        accepted = torch.zeros(sequences, dtype=torch.int32, device=device)
    steps = random_steps(w, sequences, device, generator)
    out = torch.empty_like(steps.v)
    state *= w.head_dim**-0.5
    return Inputs(steps, state, slots, out, snapshots, draft, accepted)


def arguments(w: GDNWorkload, i: Inputs, backend: str) -> dict[str, Any]:
    """Keyword arguments of the public call of a mode; q, k and v come before them."""
    s = i.steps
    gates = {"a": s.a, "b": s.b, "A_log": s.A_log, "dt_bias": s.dt_bias}
    common = {"state": i.state, "state_indices": i.slots, "out": i.out, "backend": backend}
    if w.mode == "verify":
        return {**common, **gates, "draft": i.draft, "num_accepted": i.accepted}
    update = w.mode != "snapshots"
    return {**common, **gates, "update_state": update, "intermediate_states": i.snapshots}


def ours(w: GDNWorkload, backend: str) -> Run:
    """The call through the public API."""
    function = cutemoe.gdn_verify if w.mode == "verify" else cutemoe.gdn_decode

    def run(i: Inputs) -> torch.Tensor:
        return function(i.steps.q, i.steps.k, i.steps.v, **arguments(w, i, backend))

    return run


class GDNCase:
    """Calls on buffer sets in rotation.

    A verify's number of accepted tokens is redrawn from 0..T between replays; the first call of a
    set has an empty window.
    """

    def __init__(
        self,
        w: GDNWorkload,
        sequences: int,
        run: Run,
        device: torch.device,
        generator: torch.Generator,
        memory: float = MEMORY,
    ) -> None:
        self.w, self.sequences, self.run = w, sequences, run
        self.generator = generator
        count = sets_of(w, sequences, memory)
        self.sets = [random_inputs(w, sequences, device, generator) for _ in range(count)]
        self.rounds = -(-MIN_CALLS // count)
        self.calls = self.rounds * count
        self.y: list[torch.Tensor] = []

    def body(self) -> None:
        """Every call once."""
        for _ in range(self.rounds):
            self.y = [self.run(i) for i in self.sets]

    def refresh(self) -> None:
        """New numbers of accepted tokens; other modes have nothing to redraw."""
        for i in self.sets:
            if i.accepted is not None:
                i.accepted.random_(0, self.w.tokens + 1, generator=self.generator)

    def check(self) -> Verdict:
        """Some sequences of one call, with the real batch, against a float64 token loop."""
        i = self.sets[0]
        count = min(CHECKED_ROWS, self.sequences)
        rows = torch.linspace(0, self.sequences - 1, count, device=i.state.device).long()
        slots = i.slots[rows].long()
        before = i.state[slots].clone()
        i.out.fill_(math.nan)
        if i.accepted is not None:
            return self._check_verify(i, i.accepted, rows, before)
        out = self.run(i)
        (exact, states), (path, rounded) = (
            oracle.gdn(i.steps.of(rows), before, dtype) for dtype in (torch.float64, torch.float32)
        )
        verdicts = [oracle.judge(out[rows], exact, path)]
        if i.snapshots is not None:
            verdicts.append(oracle.judge(i.snapshots[rows], states, rounded))
        if self.w.mode != "snapshots":
            verdicts.append(oracle.judge(i.state[slots], states[:, -1], rounded[:, -1]))
        elif not torch.equal(i.state[slots], before):
            return Verdict(math.inf, 0.0)
        return oracle.worst(verdicts)

    def _check_verify(
        self, i: Inputs, num_accepted: torch.Tensor, rows: torch.Tensor, before: torch.Tensor
    ) -> Verdict:
        """Two windows: the second starts from the accepted prefix of the first."""
        num_accepted.zero_()
        first = self.run(i)[rows].clone()
        num_accepted.random_(0, self.w.tokens + 1, generator=self.generator)
        accepted = num_accepted[rows].long()
        second = self.run(i)[rows]
        steps = i.steps.of(rows)
        results = []
        for dtype in (torch.float64, torch.float32):
            o, states = oracle.gdn(steps, before, dtype)
            prefix = torch.cat((before[:, None].to(states.dtype), states), 1)
            start = prefix[torch.arange(len(rows), device=rows.device), accepted]
            results.append((o, oracle.gdn(steps, start, dtype)[0]))
        (exact1, exact2), (path1, path2) = results
        verdicts = (oracle.judge(first, exact1, path1), oracle.judge(second, exact2, path2))
        return oracle.worst(verdicts)

    def work(self) -> Work:
        """Unavoidable bytes of a call, with the tokens really accepted before it."""
        if self.w.mode != "verify":
            return gdn_work(self.w, self.sequences)
        means = [float(i.accepted.float().mean()) for i in self.sets if i.accepted is not None]
        return gdn_work(self.w, self.sequences, sum(means) / len(means))

    def confirm(self) -> str | None:
        """Outputs of the replays must be finite."""
        for y in self.y:
            if not torch.isfinite(y).all():
                return "the replayed graph wrote values that are not finite"
        return None


def explain(case: GDNCase, backend: str) -> Any:
    """What `cutemoe.explain` says of a call of the case."""
    i = case.sets[0]
    s = i.steps
    return cutemoe.explain(case.w.op, s.q, s.k, s.v, **arguments(case.w, i, backend))
