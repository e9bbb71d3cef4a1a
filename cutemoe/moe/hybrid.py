"""How the stages of a NVFP4 layer are launched, by its routed rows; and prefill from elsewhere.

| style | launches | for |
|---|---|---|
| static | one, cooperative; items dealt out | few rows, where launches are what a layer costs |
| dynamic | one, cooperative; items from a counter | more rows, whose tiles differ in length |
| pipeline | one a stage | many rows, where every stage has many waves of CTAs |
| external | whatever was plugged in with `plug_prefill` | from its number of rows on |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cutemoe.errors import invalid
from cutemoe.moe.problem import Problem
from cutemoe.runtime.device import Device

MAX_ROWS = 2**31 - 1
# most routed rows, style. One H200 with the MMA emulated, 2026-11-27, E=128 H=4096 I=2048 top_k=8,
# us at 1 / 16 / 256 tokens: pipeline 80 / 703 / 1457, static 97 / 864 / 1807, dynamic 100 / 874 /
# 1826: two CTAs of the pipeline share a multiprocessor there
EMULATED = ((MAX_ROWS, "pipeline"),)
# SM120 has room for one CTA. Nobody has measured it: numbers to begin with
NATIVE = ((64, "static"), (1024, "dynamic"), (MAX_ROWS, "pipeline"))


@dataclass(frozen=True)
class Prefill:
    """A back end for large batches; see `plug_prefill`."""

    name: str
    rows: int
    run: Callable[[Problem, Any], None]
    refuse: Callable[[Problem, Device], str | None]


_PLUGGED: dict[str, Prefill] = {}


def plug_prefill(
    name: str,
    run: Callable[[Problem, Any], None],
    rows: int,
    refuse: Callable[[Problem, Device], str | None] = lambda problem, device: None,
) -> Callable[[], None]:
    """Lets another library run the layers that back end "cute_nvfp4" is asked for, from `rows` on.

    Args:
        name: for `unplug` and messages; a second one of the same name takes the place of the first.
        run: run(problem, tensors) writes tensors.out; tensors is a `cutemoe.moe.tensors.MoETensors`
            and problem a `Problem`. It allocates what it needs, launches to torch's current stream
            and reads nothing back, or the layer cannot be captured in a CUDA graph.
        rows: the least tokens * top_k that it takes. Of several, the one with most rows is asked
            first.
        refuse: refuse(problem, device): why it does not run this layer, or None. Called for every
            call; what it refuses runs as if nothing were plugged in.

    Returns:
        A function that takes it out again.

    Raises:
        InvalidCall: rows is no positive integer, or run or refuse cannot be called.
    """
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise invalid("rows", "a positive integer", repr(rows))
    for argument, f in (("run", run), ("refuse", refuse)):
        if not callable(f):
            raise invalid(argument, "a function", type(f).__name__)
    mine = _PLUGGED[name] = Prefill(name, rows, run, refuse)

    def unplug() -> None:
        if _PLUGGED.get(name) is mine:
            del _PLUGGED[name]

    return unplug


def prefill_of(problem: Problem, device: Device) -> Prefill | None:
    """What was plugged in for a problem, or None."""
    # what is plugged in rounds as it likes: not as torch, operation by operation
    if not _PLUGGED or problem.rounding != "fused":
        return None
    rows = problem.tokens * problem.top_k
    for p in sorted(_PLUGGED.values(), key=lambda p: -p.rows):
        if rows >= p.rows and p.refuse(problem, device) is None:
            return p
    return None


def style_of(rows: int, native: bool, table: tuple[tuple[int, str], ...] | None = None) -> str:
    """The launch style for that many routed rows, where the MMA is an instruction or emulated."""
    table = table or (NATIVE if native else EMULATED)
    return next(style for most, style in table if rows <= most)
