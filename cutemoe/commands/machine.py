"""What is installed and plugged in; reads, changes nothing."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import torch


def installed(name: str) -> str | None:
    """Version of a distribution, of Python itself, or None."""
    if name == "python":
        return platform.python_version()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def driver_api() -> str | None:
    """CUDA version the driver speaks, as "13.0"; None without a driver."""
    version = ctypes.c_int(0)
    for name in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError):
            if ctypes.CDLL(name).cuDriverGetVersion(ctypes.byref(version)) == 0:
                return f"{version.value // 1000}.{version.value % 1000 // 10}"
    return None


def driver() -> str | None:
    """Version of the driver from nvidia-smi, or None."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.split("\n")[0].strip() or None
    return None


def gpus() -> list[Any]:
    """Properties of every CUDA device torch sees."""
    return [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]


def dsl_flavour() -> str:
    """Which CUDA the CuTe DSL was built for and carries; imports it.

    Raises:
        Exception: whatever importing it raises here.
    """
    cuda = getattr(importlib.import_module("cutlass"), "CUDA_VERSION", None)
    if cuda is None:
        return "unknown flavour"
    return f"flavour cu{cuda.major}, CUDA toolkit {cuda.major}.{cuda.minor}"


def dsl_parts() -> dict[str, str]:
    """Installed versions of the DSL's own distributions, which must be equal."""
    names = ["nvidia-cutlass-dsl"]
    names += [f"nvidia-cutlass-dsl-libs-{part}" for part in ("base", "core", "cu12", "cu13")]
    return {name: version for name in names if (version := installed(name))}
