"""`cutemoe compile`: the kernels of a preset in the cache, before anything serves.

Worker processes (workers.py) see no GPU, so an image can be built anywhere.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable
from typing import Any

import torch

from cutemoe.commands.prepare import jobs
from cutemoe.commands.table import table
from cutemoe.commands.workers import Done, Progress, compiled
from cutemoe.errors import InvalidCall, invalid
from cutemoe.runtime import cache, settings
from cutemoe.runtime.device import CARDS, Device
from cutemoe.runtime.preset import PRESETS


def run(
    as_json: bool = False,
    arch: str | None = None,
    preset: Iterable[str] = (),
    workers: int | None = None,
    cache_dir: str | None = None,
) -> int:
    """Compiles the presets; 1 if a kernel failed, 2 if the arguments are wrong, else 0."""
    if cache_dir is not None:
        settings.set_cache_dir(cache_dir)
    try:
        chosen = _arch(arch)
        wanted = [job for name in preset for job in jobs(_preset(name))]
        folder = _folder()
    except InvalidCall as e:
        print(e, file=sys.stderr)
        return 2
    started = time.perf_counter()
    done = compiled(wanted, chosen, workers or os.cpu_count() or 1, Progress(not as_json))
    seconds = time.perf_counter() - started
    failed = [d for d in done if d.error]
    if as_json:
        print(json.dumps(report(done, chosen, folder, seconds)))
    else:
        print(text(done, chosen, folder, seconds))
    return 1 if failed else 0


def _arch(arch: str | None) -> str:
    if arch is None:
        if not torch.cuda.is_available():
            raise invalid("arch", "a name where there is no GPU", "none", "--arch sm_90a")
        return Device.of(torch.device("cuda")).target
    name = f"{arch}a" if f"{arch}a" in CARDS else arch
    if name not in CARDS:
        raise invalid("arch", f"one of {', '.join(CARDS)}", repr(arch))
    return name


def _preset(name: str) -> str:
    if name not in PRESETS:
        raise invalid("preset", f"one of {', '.join(PRESETS)}", repr(name))
    return name


def _folder() -> str:
    folder = settings.cache_dir()
    if folder is None:
        raise invalid("cache-dir", "a folder to keep kernels in", "none", "set CUTEMOE_CACHE_DIR")
    if (why := cache.Cache(folder).trouble()) is not None:
        raise InvalidCall(f"cache-dir: {why}")
    return str(folder)


def _kernels(done: list[Done]) -> dict[str, dict[str, Any]]:
    """Every kernel once; one that some job compiled counts as compiled."""
    found: dict[str, dict[str, Any]] = {}
    for d in done:
        for key, kernel in d.kernels.items():
            if key not in found or kernel["built"]:
                found[key] = kernel
    return found


def report(done: list[Done], arch: str, folder: str, seconds: float) -> dict[str, Any]:
    """Everything as plain data."""
    return {
        "arch": arch,
        "folder": folder,
        "seconds": round(seconds, 1),
        "kernels": _kernels(done),
        "failed": [{"job": str(d.job), "error": d.error} for d in done if d.error],
        "ok": not any(d.error for d in done),
    }


def text(done: list[Done], arch: str, folder: str, seconds: float) -> str:
    """Kernels by name with their number, bytes and seconds."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for kernel in _kernels(done).values():
        rows.setdefault(kernel["kernel"].removeprefix("cutemoe."), []).append(kernel)
    body = [
        [
            name,
            str(len(found)),
            str(sum(k["built"] for k in found)),
            f"{sum(k['nbytes'] for k in found) / 1024:.0f}",
            f"{sum(k['seconds'] for k in found if k['built']):.1f}",
        ]
        for name, found in sorted(rows.items())
    ]
    titles = ["kernel", "number", "compiled", "KB", "s"]
    parts = [table(titles, body, right="number compiled KB s")]
    if failed := [d for d in done if d.error]:
        parts.append("\n".join(["FAIL:", *(f"  {d.job}: {d.error}" for d in failed)]))
    number, nbytes = len(_kernels(done)), sum(k["nbytes"] for k in _kernels(done).values())
    parts.append(
        f"{number} kernels, {nbytes / 2**20:.1f} MB for {arch} in {folder}, {seconds:.0f} s"
    )
    return "\n\n".join(parts)
