"""Programmatic dependent launch: a kernel starts while the one before it in the stream ends."""

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
