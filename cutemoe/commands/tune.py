"""`cutemoe tune`: measures the configurations of a preset's expert layers and keeps the fastest.

Every candidate is compared with float64 before it is timed, on calls with routing of their own so
that weights come from memory. The heuristic's choice is the first candidate, and stays unless
another is faster.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import cutemoe
from cutemoe import registry
from cutemoe.commands import oracle
from cutemoe.commands.cases import random_weight
from cutemoe.commands.clock import Call, GraphClock
from cutemoe.commands.table import table
from cutemoe.errors import InvalidCall, invalid
from cutemoe.runtime import tune
from cutemoe.runtime.device import Device
from cutemoe.runtime.preset import PRESETS, Layer

SIZES = (1, 4, 16, 64, 256, 1024, 4096)
CALLS = 4
CHECKED = 8


class Bench:
    """A layer of random weights, and calls of it to check and to time.

    Args:
        layer: of a preset.
        format: (format, group size or None, activations).
        us: microseconds of a call, from calls.
    """

    def __init__(
        self,
        layer: Layer,
        format: tuple[str, int | None, str],
        device: torch.device,
        us: Callable[[Sequence[Call]], float],
    ) -> None:
        self.preset, (weights, _, self.activations) = layer, format
        self.device, self.us = device, us
        h, i, e = layer.hidden, layer.intermediate, layer.experts
        w13 = random_weight((e, 2 * i, h), weights, device)
        w2 = random_weight((e, h, i), weights, device)
        b13 = torch.randn(e, 2 * i, device=device) if layer.biases else None
        b2 = torch.randn(e, h, device=device) if layer.biases else None
        self.layer = oracle.Layer(w13, w2, b13, b2, layer.gate_up, self.activations, layer.swiglu)
        self.moe = cutemoe.prepare_moe(
            w13, w2, b13, b2, activations=self.activations, gate_up=layer.gate_up
        )
        self.activation = cutemoe.SwiGLU(*layer.swiglu)

    def calls(self, tokens: int) -> list[Callable[[], torch.Tensor]]:
        """Calls with inputs and routing of their own, writing to memory of their own."""
        layer, made = self.preset, []
        workspace = cutemoe.Workspace.for_moe(self.moe, tokens, layer.top_k)
        for _ in range(CALLS if tokens <= 1024 else 2):
            x = torch.randn(tokens, layer.hidden, device=self.device).to(torch.bfloat16)
            logits = torch.randn(tokens, layer.experts, device=self.device)
            ids, weights = cutemoe.route(logits, layer.top_k)
            made.append((x, ids, weights, torch.empty_like(x)))
        self.first = made[0]

        def call(x: Any, ids: Any, weights: Any, out: Any) -> torch.Tensor:
            return cutemoe.fused_moe(
                x,
                self.moe,
                ids,
                weights,
                activation=self.activation,
                out=out,
                workspace=workspace,
            )

        return [lambda a=a: call(*a) for a in made]

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Some rows of the first call, float64 and torch's own path of them."""
        x, ids, weights, _ = self.first
        rows = torch.linspace(0, len(x) - 1, min(CHECKED, len(x)), device=x.device).long()
        return rows, *oracle.moe(x[rows], self.layer, ids[rows], weights[rows])

    def explain(self) -> Any:
        """What the first call would run."""
        x, ids, weights, _ = self.first
        return cutemoe.explain("fused_moe", x, self.moe, ids, weights, activation=self.activation)


def tuned(
    bench: Bench, tokens: int, seconds: float, say: Callable[[str], None]
) -> tuple[tune.Row, float]:
    """The row of the fastest configuration, and microseconds of the heuristic's.

    Raises:
        InvalidCall: the back end that runs the layer has nothing to tune.
    """
    calls = bench.calls(tokens)
    with tune.trying(None):
        found = bench.explain()
    how = registry.tuning("fused_moe", found.backend or "")
    if how is None:
        raise InvalidCall(f"tune: expected a back end with configurations, got {found.backend}")
    rows, exact, path = bench.expected()
    out = bench.first[-1]

    def measure(config: Any) -> float:
        with tune.trying(how.plain(config)):
            out.fill_(torch.nan)
            y = calls[0]()
            verdict = oracle.judge(y[rows], exact, path)
            if not verdict.ok or not bool(torch.isfinite(y).all()):
                raise RuntimeError(f"error {verdict.error:.3g}, bound {verdict.bound:.3g}")
            return bench.us(calls)

    passes = how.passes(found.problem, found.device)
    best, seen = tune.search(found.config, passes, measure, seconds=seconds, say=say)
    shape, size = how.key(found.problem)
    row = tune.Row("fused_moe", shape, size, how.plain(best), round(seen[best], 2))
    return row, seen[found.config]


def run(
    as_json: bool = False,
    preset: Iterable[str] = (),
    weights: str | None = None,
    sizes: str | None = None,
    seconds: float = 300.0,
    out: str | None = None,
) -> int:
    """Tunes the presets within the time; 2 if the arguments are wrong, else 0."""
    try:
        if not torch.cuda.is_available():
            raise invalid("tune", "a CUDA device", "none")
        chosen = {name: _layer(name) for name in preset}
        tokens = [int(n) for n in sizes.split(",")] if sizes else list(SIZES)
        place = torch.device("cuda")
        path = _path(out, Device.of(place))
    except (InvalidCall, ValueError) as e:
        print(e, file=sys.stderr)
        return 2
    clock = GraphClock(place)
    deadline, done = time.monotonic() + seconds, []
    cells = [
        (name, format, n)
        for name, layer in chosen.items()
        for format in layer.formats
        for n in tokens
        if weights is None or format[0] in weights.split(",")
    ]
    bench: tuple[Any, Any] = (None, None)
    for number, (name, format, n) in enumerate(cells):
        left = deadline - time.monotonic()
        if left <= 0:
            break
        say = _progress(f"[{number + 1}/{len(cells)}] {name} {format[0]} x {format[2]} {n}")
        try:
            if bench[0] != (name, format):
                bench = (None, None)
                bench = ((name, format), Bench(chosen[name], format, place, clock.us))
            row, before = tuned(bench[1], n, left / (len(cells) - number), say)
        except InvalidCall as e:
            say(str(e))
            continue
        tune.write(path, [row])
        done.append((name, row, before))
    print(json.dumps(report(done, path)) if as_json else text(done, path))
    return 0


def _layer(name: str) -> Layer:
    found = PRESETS.get(name)
    if found is None or found.layer is None:
        known = [n for n, p in PRESETS.items() if p.layer]
        raise invalid("preset", f"one of {', '.join(known)}", repr(name))
    return found.layer


def _path(out: str | None, device: Device) -> Path:
    folder = Path(out) if out else tune.user_folder()
    if folder is None:
        raise invalid("out", "a folder for the table", "none", "set CUTEMOE_CACHE_DIR")
    return tune.file_of(folder, device)


def _progress(prefix: str) -> Callable[[str], None]:
    return lambda line: print(f"{prefix}: {line}", file=sys.stderr, flush=True)


def report(done: list[tuple[str, tune.Row, float]], path: Path) -> dict[str, Any]:
    """Everything as plain data."""
    rows = [
        {"preset": name, **row.shape, "tokens": row.size, "us": row.us, "heuristic_us": before}
        for name, row, before in done
    ]
    return {"file": str(path), "rows": rows}


def text(done: list[tuple[str, tune.Row, float]], path: Path) -> str:
    """Microseconds before and after by preset, formats and tokens."""
    titles = ["preset", "weights", "activations", "tokens", "heuristic", "tuned", "gain"]
    body = [
        [
            name,
            row.shape["weight"],
            row.shape["activations"],
            str(row.size),
            f"{before:.1f}",
            f"{row.us:.1f}",
            f"{100 * (before / row.us - 1):.1f} %",
        ]
        for name, row, before in done
    ]
    shown = table(titles, body, right="tokens heuristic tuned gain")
    return f"{shown}\n\n{len(done)} rows in {path}"
