"""Peers to compare with. A file here is a peer; it adapts an installed package and vendors nothing,
or it is our own text of a method that others use.

A module `perf/baselines/<peer>.py` defines a subset of

    def unavailable() -> str | None          why the peer does not run here; imports nothing else
    def refuse(workload) -> str | None       why it does not run a workload
    def prepare_layer(workload, layer)       one `commands.oracle.Layer` in the peer's layout
    def run_layer(prepared, x, logits)       routing and layer -> [T, H]
    def run_steps(workload, inputs)          one call on `gdn_case.Inputs` -> [B, T, HV, D]

`unavailable` is required, and at least one of the two runs. What it returns passes the same gate as
our own back ends before it is timed. Its records carry the back end name "peer:<module>".
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path
from types import ModuleType

PREFIX = "peer:"


def names() -> tuple[str, ...]:
    """Back end names of every peer in this folder, whether it runs here or not."""
    return tuple(PREFIX + m.name for m in pkgutil.iter_modules(__path__))


def load(backend: str) -> ModuleType:
    """The module behind a back end name "peer:<module>"."""
    return importlib.import_module(f"{__name__}.{backend.removeprefix(PREFIX)}")


def missing(package: str, part: str, install: str) -> str | None:
    """Why the file `part` of an installed package cannot be used, or None; imports nothing."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        return f"{package} is not installed; {install}"
    places = spec.submodule_search_locations or ()
    if not any((Path(place) / part).is_file() for place in places):
        return f"the {package} found at {', '.join(places) or spec.origin} has no {part}; {install}"
    return None


def reason(backend: str, op: str, workload: object) -> str | None:
    """Why the peer does not run the workload here, or None."""
    peer = load(backend)
    if why := peer.unavailable():
        return why
    run = {"fused_moe": "run_layer", "gdn_decode": "run_steps"}.get(op)
    if run is None or not hasattr(peer, run):
        return f"does not run {op}"
    refuse = getattr(peer, "refuse", None)
    return refuse(workload) if refuse else None
