"""What every launch of this package shares.

Rejected: programmatic dependent launch. Without it the gaps between the kernels of a layer are 0.3
to 0.5 us in a CUDA graph; with it the early programs of FC2 crowd the multiprocessors, and FC1 at
one token takes 50 us in place of 20 (one H200, 2026-11, Triton 3.6).
"""

from __future__ import annotations

from typing import Any

from cutemoe.runtime import settings


def portable() -> bool:
    """True where kernels are interpreted, so that device code must do without PTX."""
    return settings.triton_interprets()


def options(warps: int, stages: int = 1) -> dict[str, Any]:
    """Keyword arguments of a launch; FP fusion is named because its default changes."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
