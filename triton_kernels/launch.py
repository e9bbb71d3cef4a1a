"""What every launch of this package shares: compile options, and programmatic dependent launch.

With `PDL` a kernel may start while its predecessor on the stream still runs; `after_previous` then
blocks until the predecessor has finished and its writes are visible. Every kernel here calls it
before it touches memory, so that finishing kernels finish in order, as without PDL.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from cutemoe.runtime import settings


@triton.jit
def after_previous(PDL: tl.constexpr):
    """Lets the next kernel of the stream start, then waits for the previous one to finish."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def portable() -> bool:
    """True where kernels are interpreted, so that device code must do without PTX."""
    return settings.triton_interprets()


@lru_cache(maxsize=64)
def _has_pdl(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)


def has_pdl(device: torch.device) -> bool:
    """True where a kernel may start before its predecessor has finished."""
    return device.type == "cuda" and not portable() and _has_pdl(device.index or 0)


def options(warps: int, stages: int, pdl: bool) -> dict[str, Any]:
    """Keyword arguments of a launch; FP fusion is named because its default changes."""
    given: dict[str, Any] = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    if pdl:
        given["launch_pdl"] = True
    return given
