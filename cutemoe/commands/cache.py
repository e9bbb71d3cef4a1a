"""`cutemoe cache`: the compiled kernels that are kept, listed, verified or removed."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

from cutemoe.commands.table import table
from cutemoe.runtime import settings
from cutemoe.runtime.cache import Broken, Cache


@dataclass(frozen=True)
class Line:
    """An entry; `broken` says why it would not be loaded."""

    key: str
    kernel: str = ""
    arch: str = ""
    nbytes: int = 0
    seconds: float = 0.0
    versions: str = ""
    broken: str = ""


def run(as_json: bool = False, action: str = "list", cache_dir: str | None = None) -> int:
    """Lists, verifies or clears; 1 where the folder or an entry is not as it should be, else 0."""
    if cache_dir is not None:
        settings.set_cache_dir(cache_dir)
    folder = settings.cache_dir()
    if folder is None:
        print("no folder: CUTEMOE_CACHE_DIR is empty", file=sys.stderr)
        return 1
    cache = Cache(folder)
    if (why := cache.trouble()) is not None:
        print(why, file=sys.stderr)
        return 1
    lines = entries(cache)
    broken = [line for line in lines if line.broken]
    if action == "clear":
        for line in lines:
            with cache.lock(line.key):
                cache.remove(line.key)
    if as_json:
        kept = [asdict(line) for line in lines]
        print(json.dumps({"folder": str(folder), "action": action, "entries": kept}))
    else:
        print(text(lines, str(folder), action))
    return 1 if broken and action == "verify" else 0


def entries(cache: Cache) -> list[Line]:
    """Every entry, read whole."""
    found = []
    for key in cache.names():
        try:
            entry = cache.read(key)
        except (Broken, OSError) as e:
            found.append(Line(key, broken=str(e)))
            continue
        m = entry.manifest
        versions = ", ".join(p for p in m["parts"] if " " in p and len(p) < 60)
        found.append(Line(key, m["kernel"], m["arch"], len(entry.data), m["seconds"], versions))
    return found


def text(lines: list[Line], folder: str, action: str) -> str:
    """A table, and one line that sums it up."""
    body = [
        [
            line.key[:12],
            line.kernel.removeprefix("cutemoe.") or "-",
            line.arch or "-",
            f"{line.nbytes / 1024:.0f}",
            f"{line.seconds:.2f}",
            line.broken or "ok",
        ]
        for line in lines
    ]
    size = sum(line.nbytes for line in lines) / 2**20
    broken = sum(bool(line.broken) for line in lines)
    what = "removed" if action == "clear" else f"{broken} broken"
    last = f"{len(lines)} kernels, {size:.1f} MB in {folder}, {what}"
    if action == "clear" or not lines:
        return last
    return table(["key", "kernel", "arch", "KB", "s", "state"], body, right="KB s") + f"\n\n{last}"
