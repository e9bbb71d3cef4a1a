"""What a call costs the host: microseconds of Python until it returns, nothing waited for.

`python perf/host_time.py` makes small calls of every op on the GPU, and prints a json line each:
the best of 3 x 8 rounds of 200 calls, of calls that are recalled (`cutemoe/runtime/recall.py`) and
of calls that are checked, which an address off 16 bytes makes them, and of bound ones. torch's own
`add_` is the measure of a host: they differ by a factor of two and more.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import machine
import torch

import cutemoe
from cutemoe import bind

CALLS = 200
PASSES = 3


def microseconds(call: Callable[[], Any], rounds: int, device: torch.device) -> float:
    """The best round of a call that returns at once: what else a host does only adds to it."""
    found = []
    for _ in range(rounds + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - start) / CALLS * 1e6)
    return min(found[1:])


def off(x: torch.Tensor) -> torch.Tensor:
    """A copy whose address is no multiple of 16 bytes, but one of the elements a vector has."""
    flat = torch.empty(x.numel() + 2, dtype=x.dtype, device=x.device)[2:]
    return flat.view(x.shape).copy_(x)


# name of an op, a call of it, one that is checked, and its bound call
Timed = Iterator[tuple[str, Callable[[], Any], Callable[[], Any], Callable[[], Any]]]


def gdn(device: torch.device, backend: str) -> Timed:
    """Decoding of one token and verification of four, 4 sequences, 32 heads of 128."""
    B, HQ, HV, D = 4, 16, 32, 128
    for name, T in (("gdn_decode", 1), ("gdn_verify", 4)):
        bf16: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        q, k = torch.randn(B, T, HQ, D, **bf16), torch.randn(B, T, HQ, D, **bf16)
        v, out = torch.randn(B, T, HV, D, **bf16), torch.empty(B, T, HV, D, **bf16)
        a, b = torch.randn(B, T, HV, **bf16), torch.randn(B, T, HV, **bf16)
        A_log, dt_bias = torch.randn(HV, device=device), torch.randn(HV, device=device)
        state = torch.zeros(8, HV, D, D, device=device)
        slots = torch.arange(B, dtype=torch.int32, device=device)
        more: dict[str, Any] = {}
        function: Any = cutemoe.gdn_decode
        if name == "gdn_verify":
            function = cutemoe.gdn_verify
            draft = cutemoe.GDNDraft.allocate(8, T, HQ, HV, D, device=device)
            more = {"draft": draft, "num_accepted": torch.zeros_like(slots)}

        def call(
            q=q, k=k, v=v, a=a, b=b, A_log=A_log, dt_bias=dt_bias, state=state, slots=slots,
            out=out, function=function, more=more,
        ):  # fmt: skip
            return function(q, k, v, state=state, a=a, b=b, A_log=A_log, dt_bias=dt_bias,
                            state_indices=slots, out=out, backend=backend, **more)  # fmt: skip

        yield name, call, partial(call, slots=off(slots)), call(function=partial(bind, function))


def layer(device: torch.device, backend: str) -> Timed:
    """A layer of 8 experts with its workspace, and its first GEMM."""
    T, H, I, E, K = 4, 256, 256, 8, 2  # noqa: E741
    w13 = cutemoe.quantize(torch.randn(E, 2 * I, H, device=device), "mxfp4")
    w2 = cutemoe.quantize(torch.randn(E, H, I, device=device), "mxfp4")
    moe = cutemoe.prepare_moe(w13, w2, backend=backend)
    x = torch.randn(T, H, dtype=torch.bfloat16, device=device)
    ids, weights = cutemoe.route(torch.randn(T, E, device=device), K)
    out = torch.empty_like(x)
    scratch = cutemoe.Workspace.for_moe(moe, T, K)

    def fused(ids=ids, function=cutemoe.fused_moe):
        return function(x, moe, ids, weights, out=out, workspace=scratch, backend=backend)

    bound = fused(function=partial(bind, cutemoe.fused_moe))
    yield "fused_moe", fused, partial(fused, ids=off(ids)), bound
    packed = cutemoe.prepare_grouped_gemm(w13, backend=backend)
    offsets = torch.tensor([0, 1, 1, 2, 3, 3, 3, 4, 4], dtype=torch.int32, device=device)
    y = torch.empty(T, 2 * I, dtype=torch.bfloat16, device=device)

    def gemm(offsets=offsets, function=cutemoe.grouped_gemm):
        return function(x, packed, offsets, out=y, backend=backend)

    bound = gemm(function=partial(bind, cutemoe.grouped_gemm))
    yield "grouped_gemm", gemm, partial(gemm, offsets=off(offsets)), bound
    if backend == "triton":
        logits = torch.randn(T, E, device=device)
        route = partial(cutemoe.route, logits, K)
        yield "route", route, partial(cutemoe.route, off(logits), K), bind("route", logits, K)


def main(argv: list[str] | None = None) -> int:
    """Prints a line for each op and back end."""
    p = argparse.ArgumentParser(prog="python perf/host_time.py", description=__doc__)
    p.add_argument("--device", default="cuda")
    p.add_argument("--rounds", type=int, default=8)
    p.add_argument("--backends", default="cute,triton", help="a,b,...")
    p.add_argument("--commit", default="")
    args = p.parse_args(argv)
    device = torch.device(args.device)
    where = {
        "device": machine.device_name(device), **machine.versions(), "date": machine.now(),
        "commit": args.commit or machine.commit(),
    }  # fmt: skip
    one = torch.zeros(8, device=device)
    add = microseconds(lambda: one.add_(1), args.rounds, device)
    print(json.dumps({"call": "torch add_", "us": round(add, 2), **where}), flush=True)
    calls = {
        (name, backend): timed
        for backend in args.backends.split(",")
        for cases in (gdn, layer)
        for name, *timed in cases(device, backend)
    }
    best = {key: [math.inf] * 3 for key in calls}
    # a host may be slow for a second
    for _ in range(PASSES):
        for key, timed in calls.items():
            found = [microseconds(c, args.rounds, device) for c in timed]
            best[key] = [*map(min, best[key], found)]
    for (name, backend), (us, us_checked, us_bound) in best.items():
        line = {"call": name, "backend": backend, "us": round(us, 2),
                "us_checked": round(us_checked, 2), "us_bound": round(us_bound, 2),
                **where}  # fmt: skip
        print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
