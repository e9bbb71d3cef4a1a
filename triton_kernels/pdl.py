"""Programmatic dependent launch: a kernel starts while the one before it in the stream ends.

Routing and sorting are launched so, and a CuTe GEMM behind them. One H200, 2026-11-30, us a layer
at 1 / 4 / 16 tokens without and with: h4096 i2048 e256 k6 37.4 / 91.7 / 275 and 36.3 / 90.0 / 274,
gpt-oss-120b 32.3 / 69.7 / 188 and 31.2 / 68.1 / 187; beyond, nothing.

Rejected: combine_slots launched so: 34.4 -> 34.8 and 86.7 -> 88.1 us at 1 and 4 tokens, and
gpt-oss-120b 29.2 -> 28.3 and 65.3 -> 64.6; no rule was found.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from cutemoe.runtime.device import Device


def dependent(x: torch.Tensor) -> bool:
    """True where the device of x can launch so; a kernel's PDL and what `options` takes."""
    return Device.of(x.device).arch >= 90


@triton.jit
def results_of_the_last_kernel(PDL: tl.constexpr):
    """Waits until what ran before is done and visible, then lets the next kernel start early.

    To be called before a program reads or writes global memory.
    """
    if PDL:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
