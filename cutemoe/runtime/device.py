"""What a plan may know of a machine."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache

import torch

from cutemoe.runtime import settings


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
        """The machine behind a tensor's device."""
        if device.type != "cuda":
            return _host(device.type, settings.triton_interprets())
        index = device.index if device.index is not None else torch.cuda.current_device()
        return _cuda(index)

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.arch})" if self.type == "cuda" else self.type


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
