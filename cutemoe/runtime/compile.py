"""Compiled kernels by configuration: one build for each key, in this process.

Decision: the key is the frozen configuration a kernel is built from, and the device. A build needs
no tensor, so a persistent cache can put itself between `lookup` and `build` without a change in any
kernel. Rejected: `functools.cache`, which neither locks (`cute.compile` is not thread-safe) nor
knows that a CUDA graph is being captured.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
import time
from collections.abc import Callable, Hashable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch

from cutemoe.errors import InvalidCall
from cutemoe.runtime.device import Device

Config = TypeVar("Config", bound=Hashable)

_LOG = logging.getLogger("cutemoe.compile")
_LOCK = threading.Lock()
_KERNELS: dict[tuple[Any, ...], Any] = {}
_BUILDS: list[float] = []


def compiled(build: Callable[[Config], Any]) -> Callable[[Config], Any]:
    """A build function whose kernels are kept: the second call of a configuration only looks up.

    Raises:
        InvalidCall: a kernel would have to be compiled while a CUDA graph is being captured.
    """

    @wraps(build)
    def lookup(config: Config) -> Any:
        key = (build, config, torch.cuda.current_device() if torch.cuda.is_available() else None)
        kernel = _KERNELS.get(key)
        return _build(key, build, config) if kernel is None else kernel

    return lookup


def _build(key: tuple[Any, ...], build: Callable[[Config], Any], config: Config) -> Any:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise InvalidCall(
            f"CUDA graph capture: expected a compiled kernel, got none for {config} (make the call "
            "once before the capture)"
        )
    with _LOCK:
        if key not in _KERNELS:
            start = time.perf_counter()
            _KERNELS[key] = build(config)
            _BUILDS.append(time.perf_counter() - start)
            _LOG.info("compiled %s in %.2f s", config, _BUILDS[-1])
        return _KERNELS[key]


def build_count() -> int:
    """Kernels compiled by this process so far."""
    return len(_BUILDS)


def cute_unavailable(device: Device) -> str | None:
    """Why no CuTe kernel runs on this device, whatever the problem."""
    if device.type != "cuda":
        return f"needs a CUDA device, got {device}"
    if device.arch < 80:
        return f"needs sm_80 or newer, got sm_{device.arch}"
    missing = _missing()
    return f"{missing} is not installed" if missing else None


@lru_cache(maxsize=1)
def _missing() -> str | None:
    packages = {"cutlass": "nvidia-cutlass-dsl", "tvm_ffi": "apache-tvm-ffi"}
    for module, package in packages.items():
        if importlib.util.find_spec(module) is None:
            return package
    return None
