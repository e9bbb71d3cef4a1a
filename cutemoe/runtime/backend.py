"""Back ends as data: who can run a problem here, and why the others refuse.

Decision: refusals are strings returned by pure functions, so that dispatch, `explain`, `backends`,
tests and documentation read one source. Rejected: exceptions as control flow (a refused back end is
not an error), and import-time switches (a broken import must raise, not fall back).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch

from cutemoe.errors import Unsupported, invalid
from cutemoe.runtime import replay, settings
from cutemoe.runtime.compile import NotCompiled
from cutemoe.runtime.device import Device
from cutemoe.runtime.replay import Again
from cutemoe.runtime.tune import Tuning

Problem = Any
Refusal = Callable[[Problem, Device], "str | None"]


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    Attributes:
        name: what `backend=` selects.
        entry: "module:function" of run(problem, config, tensors), imported on first use.
        unavailable: why nothing of this back end runs on a device, or None.
        refuse: why this problem does not run on a device where others do, or None.
        configure: the configuration for a problem; None where there is nothing to choose.
        tuning: how configurations are searched; None where there is no search.
        variant: only for those who name it; neither chosen nor listed otherwise.
        replays: `entry` does nothing but launch kernels, so that launches can be made again
            (`runtime.replay`).
    """

    name: str
    entry: str
    unavailable: Callable[[Device], str | None]
    refuse: Refusal
    configure: Callable[[Problem, Device], Any] | None = None
    variant: bool = False
    tuning: Tuning | None = None
    replays: bool = False

    def reason(self, problem: Problem, device: Device) -> str | None:
        """Why this back end does not run the problem on the device, or None."""
        return self.unavailable(device) or self.refuse(problem, device)

    def load(self) -> Callable[..., Any]:
        """The function behind `entry`."""
        return _load(self.entry)

    def config(self, problem: Problem, device: Device) -> Any:
        """The configuration this back end would run the problem with."""
        return None if self.configure is None else self.configure(problem, device)

    def run(self, problem: Problem, device: Device, tensors: Any) -> None:
        """Runs the problem.

        Raises:
            NotCompiled: a kernel is missing and must not be compiled; names presets that have it.
        """
        try:
            self.load()(problem, self.config(problem, device), tensors)
        except NotCompiled as e:
            raise e.during(problem, device) from None

    def again(
        self, problem: Problem, device: Device, tensors: Any, roles: Sequence[torch.Tensor]
    ) -> Again | None:
        """A function that runs the problem with other tensors in the roles of these, of the same
        signature; None where it cannot be told which tensor has which role."""
        # interpreted kernels are no launches
        if self.replays and device.type == "cuda":
            made = replay.replayed(partial(self.run, problem, device, tensors), roles)
            if made is not None:
                return made
        try:
            rebuilt = replay.rebuilt(tensors, roles)
        except LookupError:
            return None
        return lambda tensors, addresses: self.run(problem, device, rebuilt(tensors))


@dataclass(frozen=True)
class Reason:
    """A back end and why it does not run here; reason None means it does."""

    name: str
    reason: str | None


@dataclass(frozen=True)
class Explanation:
    """The answer of `cutemoe.explain`: the choice, its configuration, and the refusals."""

    op: str
    problem: Problem
    device: Device
    backend: str | None
    config: Any
    reasons: tuple[Reason, ...]

    def __str__(self) -> str:
        chosen = self.backend or "no back end"
        lines = [f"{self.op} on {self.device}: {chosen}", f"  {self.problem}"]
        if self.config is not None:
            lines.append(f"  {self.config}")
        lines += [f"  {r.name}: {r.reason or 'runs here'}" for r in self.reasons]
        return "\n".join(lines)


@lru_cache(maxsize=64)
def _load(entry: str) -> Callable[..., Any]:
    module, _, function = entry.partition(":")
    return getattr(importlib.import_module(module), function)


def never(*_: Any) -> None:
    """The refusal of a back end that runs everything, everywhere."""


def triton_unavailable(device: Device) -> str | None:
    """Why no Triton kernel runs on this device, whatever the problem."""
    if not device.has_triton:
        return "triton is not installed"
    if device.type == "cuda" and device.arch < 80:
        return f"needs sm_80 or newer, got sm_{device.arch}"
    if device.type != "cuda" and not device.interprets:
        return f"needs a CUDA device, or TRITON_INTERPRET=1 before the first import, got {device}"
    return None


def reasons(
    backends: tuple[Backend, ...], problem: Problem, device: Device, requested: str = "auto"
) -> tuple[Reason, ...]:
    """Every back end with its answer to this problem; a variant only if it is the requested one."""
    return tuple(
        Reason(b.name, b.reason(problem, device))
        for b in backends
        if not b.variant or b.name == requested
    )


def choose(
    op: str, backends: tuple[Backend, ...], problem: Problem, device: Device, requested: str
) -> Backend:
    """The back end that runs the call: the requested one, or with "auto" the first willing one.

    On the CPU "auto" is the reference, whatever interpreters are switched on.
    """
    if requested == "auto":
        requested = settings.default_backend()
    if requested != "auto":
        for b in backends:
            if b.name == requested:
                if (why := b.reason(problem, device)) is None:
                    return b
                raise Unsupported(f"{op}: back end {b.name!r} refuses {problem} on {device}: {why}")
        names = ", ".join(repr(b.name) for b in backends)
        raise invalid("backend", f"'auto' or one of {names}", repr(requested))
    order = [b for b in backends if not b.variant]
    if device.type != "cuda":
        order.reverse()
    for b in order:
        if b.reason(problem, device) is None:
            if b is backends[-1] and device.type == "cuda":
                _warn_slow(op, b, backends, problem, device)
            return b
    why = "; ".join(f"{r.name}: {r.reason}" for r in reasons(backends, problem, device))
    raise Unsupported(f"{op}: no back end for {problem} on {device}: {why}")


def _warn_slow(
    op: str, chosen: Backend, backends: tuple[Backend, ...], problem: Problem, device: Device
) -> None:
    why = "; ".join(f"{r.name}: {r.reason}" for r in reasons(backends, problem, device) if r.reason)
    if why:
        warnings.warn(f"{op}: slow back end {chosen.name!r} on {device}: {why}", stacklevel=3)


def explain(
    op: str, backends: tuple[Backend, ...], problem: Problem, device: Device, requested: str
) -> Explanation:
    """What `choose` would do, as a record."""
    why = reasons(backends, problem, device, requested)
    try:
        b = choose(op, backends, problem, device, requested)
    except Unsupported:
        return Explanation(op, problem, device, None, None, why)
    return Explanation(op, problem, device, b.name, b.config(problem, device), why)
