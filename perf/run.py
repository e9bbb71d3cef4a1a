"""Measures workloads and appends one json line each: `python perf/run.py --workloads headline`.

A case that fails is recorded with its error and the rest goes on; the exit code is then 1. A case
that no longer fits in the time limit is skipped.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import baselines
import gdn_case
import gemm_case
import machine
import measure
import moe_case
import torch
from ceilings import measure_ceilings
from measure import Case, GraphTimer, Timer, WallTimer
from session import DeviceLost, Session
from workloads import WORKLOADS, GDNWorkload, GemmWorkload, MoEWorkload, Workload, select

import cutemoe

SEED = 20261121
CPU_CEILINGS = {"read_bytes": 1 << 24, "matmul": 128, "repeats": 3}

# batch -> the case and the configuration behind it
Make = Callable[[int], tuple[Case, dict[str, Any]]]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python perf/run.py", description=__doc__)
    p.add_argument("--workloads", type=_words, default=["headline"], help="names or patterns, a,b")
    p.add_argument("--batches", type=_integers, help="a,b,...; default: each workload's own")
    p.add_argument(
        "--backends", type=_words, help="a,b,...; default: all that run here but the reference"
    )
    p.add_argument("--out", type=Path, help="json lines file to append to")
    p.add_argument("--time-limit", type=float, default=math.inf, help="seconds for everything")
    p.add_argument("--seconds", type=float, default=0.4, help="seconds of samples a case")
    p.add_argument("--memory", type=float, default=60.0, help="GB that copies may take")
    p.add_argument("--commit", help="what to record; default: git's answer")
    p.add_argument("--device", default="cuda", help="cpu exercises the method, nothing more")
    p.add_argument("--list", action="store_true", help="print the workloads and stop")
    p.add_argument("--errors-before", type=int, default=0, help=argparse.SUPPRESS)
    return p


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _integers(text: str) -> list[int]:
    return [int(word) for word in _words(text)]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for; 0 if nothing that ran failed."""
    p = parser()
    args = p.parse_args(argv)
    if args.list:
        for w in WORKLOADS.values():
            print(f"{w.name:34} {w.op:11} batches {', '.join(map(str, w.batches))}")
        return 0
    try:
        chosen = select(args.workloads)
    except ValueError as e:
        p.error(str(e))
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        p.error("no CUDA device; --device cpu exercises the method without one")
    session = open_session(args)
    for number, w in enumerate(chosen):
        try:
            run_workload(w, session, args.batches or w.batches, args.backends)
        except DeviceLost:
            session.say("the device is lost; a new process goes on with what is left")
            return resume(args, session, [left.name for left in chosen[number + 1 :]])
        session.tidy()
    spent = time.monotonic() - session.started
    print(
        f"{session.records} records, {session.errors} errors, {session.skipped} skipped "
        f"in {spent:.0f} s: {session.out}"
    )
    return 1 if session.errors else 0


def open_session(args: argparse.Namespace) -> Session:
    """Measures the ceilings and opens the output."""
    started = time.monotonic()
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    facts = {
        "device": machine.device_name(device),
        "versions": machine.versions(),
        "commit": args.commit or machine.commit(),
        "date": machine.now(),
    }
    name = facts["date"].replace(":", "").replace("-", "") + ".jsonl"
    out = args.out or Path(__file__).parent / "results" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    timer: Timer = GraphTimer(device) if device.type == "cuda" else WallTimer()
    ceilings = measure_ceilings(timer, device, **({} if device.type == "cuda" else CPU_CEILINGS))
    session = Session(
        device,
        timer,
        ceilings,
        facts,
        partial(machine.clocks, device),
        out,
        started + args.time_limit,
        args.seconds,
        args.memory * 1e9,
        started=started,
        errors=args.errors_before,
    )
    session.say(f"{facts['device']}, commit {facts['commit']}, {ceilings.rounded()}")
    session.tidy()
    return session


def resume(args: argparse.Namespace, session: Session, left: Sequence[str]) -> int:
    """Replaces this process by one that measures what is left; returns only if nothing is."""
    if not left:
        return 1
    options: dict[str, object] = {
        "--workloads": ",".join(left),
        "--out": session.out,
        "--seconds": args.seconds,
        "--memory": args.memory,
        "--commit": session.facts["commit"],
        "--device": args.device,
        "--errors-before": session.errors,
        "--time-limit": session.deadline - time.monotonic(),
    }
    if args.batches:
        options["--batches"] = ",".join(map(str, args.batches))
    if args.backends:
        options["--backends"] = ",".join(args.backends)
    sys.stdout.flush()
    rest = [f"{name}={value}" for name, value in options.items()]
    os.execv(sys.executable, [sys.executable, str(Path(__file__).resolve()), *rest])


def backends_of(w: Workload, session: Session, asked: Sequence[str] | None) -> Iterator[str]:
    """Back ends to measure a workload with; those that do not run here are printed with why."""
    here = {r.name: r.reason for r in cutemoe.backends(w.op, session.device)}
    usual = [name for name in here if name != "reference"]
    for name in asked or [*usual, *baselines.names()]:
        if name.startswith(baselines.PREFIX):
            why = baselines.reason(name, w.op, w)
        else:
            why = here.get(name, f"{w.op} has no such back end")
        if why is None:
            yield name
        else:
            session.say(f"{w.name} {name}: does not run, {why}")


def run_workload(
    w: Workload, session: Session, batches: Sequence[int], asked: Sequence[str] | None
) -> None:
    """Measures every batch on every back end.

    Raises:
        DeviceLost: the device is gone; what was measured before is written.
    """
    for name in backends_of(w, session, asked):
        make: Make | None = None
        for batch in batches:
            if not session.fits(w.op):
                session.skipped += 1
                session.say(f"{w.name} B={batch} {name}: skipped, no time left")
                continue
            with session.case(w, name, batch):
                if make is None:
                    make = maker(w, name, session, tuple(batches))
                run_case(w, name, session, make, batch)
            session.tidy()


def run_case(w: Workload, backend: str, session: Session, make: Make, batch: int) -> None:
    """Measures one case; its buffers are free when this returns."""
    case, config = make(batch)
    measured = measure.measure(case, session.timer, seconds=session.seconds)
    session.finish(w, backend, batch, config, measured)


def maker(w: Workload, backend: str, session: Session, batches: tuple[int, ...]) -> Make:
    """Builds what the batches of a workload share, and returns how to make a case of one."""
    if isinstance(w, MoEWorkload):
        return moe_maker(w, backend, session, batches)
    if isinstance(w, GemmWorkload):
        return gemm_maker(w, backend, session, batches)
    return gdn_maker(w, backend, session)


def moe_maker(w: MoEWorkload, backend: str, session: Session, batches: tuple[int, ...]) -> Make:
    """Copies of the layer, prepared once for every batch."""
    device = session.device
    generator = torch.Generator(device).manual_seed(SEED)
    peer = baselines.load(backend) if backend.startswith(baselines.PREFIX) else None
    layers, prepared = [], []
    for number in range(moe_case.sets_of(w, batches, session.memory)):
        layer = moe_case.random_layer(w, device, generator)
        prepared.append(
            peer.prepare_layer(w, layer) if peer else moe_case.prepare(layer, backend, device)
        )
        # only the first is needed as stored, by the gate
        layers += [layer] if number == 0 else []

    def make(batch: int) -> tuple[Case, dict[str, Any]]:
        if peer:
            runs = [partial(moe_case.peer_run, peer, p) for p in prepared]
        else:
            runs = [moe_case.ours(w, p, batch, backend) for p in prepared]
        case = moe_case.MoECase(w, batch, layers[0], runs, device, generator)
        facts = {"calls": case.calls, "copies": len(runs)}
        config = {} if peer else measure.config_of(moe_case.explain(case, prepared[0], backend))
        return case, {**config, **facts}

    return make


def gemm_maker(w: GemmWorkload, backend: str, session: Session, batches: tuple[int, ...]) -> Make:
    """Copies of the weights, prepared once for every batch."""
    device = session.device
    generator = torch.Generator(device).manual_seed(SEED)
    count = gemm_case.sets_of(w, batches, session.memory)
    weights = [gemm_case.random_weight(w, device, generator) for _ in range(count)]
    runs = [gemm_case.ours(w, weight, backend) for weight in weights]

    def make(batch: int) -> tuple[Case, dict[str, Any]]:
        case = gemm_case.GemmCase(w, batch, weights[0], runs, device, generator)
        config = measure.config_of(gemm_case.explain(case, backend))
        return case, {**config, "calls": case.calls, "copies": count}

    return make


def gdn_maker(w: GDNWorkload, backend: str, session: Session) -> Make:
    """Cases with their own buffers."""
    generator = torch.Generator(session.device).manual_seed(SEED)

    def make(batch: int) -> tuple[Case, dict[str, Any]]:
        if backend.startswith(baselines.PREFIX):
            run = partial(baselines.load(backend).run_steps, w)
        else:
            run = gdn_case.ours(w, backend)
        case = gdn_case.GDNCase(w, batch, run, session.device, generator, session.memory)
        facts: dict[str, Any] = {"calls": case.calls, "copies": len(case.sets)}
        if w.mode == "verify":
            facts["accepted"] = f"uniform 0..{w.tokens}"
        if backend.startswith(baselines.PREFIX):
            return case, facts
        return case, {**measure.config_of(gdn_case.explain(case, backend)), **facts}

    return make


if __name__ == "__main__":
    sys.exit(main())
