"""What a plan may know of a machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

from cutemoe.errors import invalid
from cutemoe.runtime import settings

# multiprocessors and shared memory of the usual card of an architecture, where there is none
CARDS = {
    "sm_80": (108, 166912),
    "sm_86": (84, 101376),
    "sm_89": (128, 101376),
    "sm_90a": (132, 232448),
    "sm_100a": (148, 232448),
    "sm_103a": (148, 232448),
    "sm_120a": (188, 101376),
    "sm_121a": (48, 101376),
}
_TARGETS: list[Device] = []


@dataclass(frozen=True)
class Device:
    """Where tensors live. `arch` is 10 * major + minor of the compute capability, 0 off CUDA."""

    type: str
    index: int = 0
    name: str = "cpu"
    arch: int = 0
    sm_count: int = 0
    smem_bytes: int = 0
    has_triton: bool = False
    interprets: bool = False

    @staticmethod
    def of(device: torch.device) -> Device:
        """The machine behind a tensor's device; inside `compile_only` always the target."""
        if _TARGETS:
            return _TARGETS[-1]
        if device.type != "cuda":
            return _host(device.type, settings.triton_interprets())
        index = device.index if device.index is not None else torch.cuda.current_device()
        return _cuda(index)

    @property
    def target(self) -> str:
        """The architecture code is compiled for: with the instructions of this card alone."""
        return f"sm_{self.arch}a" if self.arch >= 90 else f"sm_{self.arch}"

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.arch})" if self.type == "cuda" else self.type


def target() -> Device | None:
    """The device of the innermost `compile_only`, or None where calls run."""
    return _TARGETS[-1] if _TARGETS else None


@contextmanager
def compile_only(arch: str) -> Iterator[Device]:
    """Calls inside, on meta tensors, compile what they would launch on a card of this architecture.

    Nothing runs, and no GPU is needed: the calls of the package choose back end and configuration
    as they would there.

    Raises:
        InvalidCall: an architecture no kernel is built for.
    """
    if arch not in CARDS:
        raise invalid("arch", f"one of {', '.join(CARDS)}", repr(arch))
    number = int(arch.removeprefix("sm_").removesuffix("a"))
    _TARGETS.append(Device("cuda", 0, arch, number, *CARDS[arch], _has_triton()))
    try:
        yield _TARGETS[-1]
    finally:
        _TARGETS.pop()


def current_index() -> int | None:
    """The current CUDA device, None where CUDA is not in use yet; does not start it."""
    return torch.cuda.current_device() if torch.cuda.is_initialized() else None


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@lru_cache(maxsize=4)
def _host(kind: str, interprets: bool) -> Device:
    return Device(kind, name=kind, has_triton=_has_triton(), interprets=interprets)


@lru_cache(maxsize=64)
def _cuda(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    return Device(
        "cuda",
        index,
        p.name,
        10 * p.major + p.minor,
        p.multi_processor_count,
        p.shared_memory_per_block_optin,
        _has_triton(),
    )
