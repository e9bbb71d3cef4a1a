"""Where a measurement was taken: device, versions, commit, clocks."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

import cutemoe

_DISTRIBUTIONS = ("torch", "triton", "nvidia-cutlass-dsl")


def device_name(device: torch.device) -> str:
    """The card, or the kind of host."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def versions() -> dict[str, str]:
    """Versions of what decides a measurement."""
    found = {"python": platform.python_version(), "cutemoe": cutemoe.__version__}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    if driver := _smi("driver_version"):
        found["driver"] = driver[0]
    return found


def clocks(device: torch.device) -> dict[str, Any]:
    """Clocks in MHz, temperature and power right now; empty where nvidia-smi is missing."""
    if device.type != "cuda":
        return {}
    names = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    values = _smi(",".join(names), device.index or 0)
    return {name: _number(v) for name, v in zip(names, values, strict=False)}


def commit() -> str:
    """Short hash of the checkout, with a plus sign where it has changes; "unknown" outside one."""
    here = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        head = _output(["git", "-C", str(here), "rev-parse", "--short=12", "HEAD"])
        dirty = _output(["git", "-C", str(here), "status", "--porcelain", "--untracked-files=no"])
        return head + ("+" if dirty else "")
    return "unknown"


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _output(command: list[str]) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=10, check=True
    ).stdout.strip()


def _smi(query: str, index: int = 0) -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        line = _output(
            [
                "nvidia-smi",
                f"--query-gpu={query}",
                "--format=csv,noheader,nounits",
                "-i",
                str(index),
            ]
        )
        return [v.strip() for v in line.split(",")]
    return []


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
