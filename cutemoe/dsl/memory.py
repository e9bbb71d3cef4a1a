"""Shared memory of a CTA: the DSL's allocator, which 4.8 moved."""

import importlib.util

if importlib.util.find_spec("cutlass.memory") is not None:
    from cutlass.memory import SmemAllocator
else:
    from cutlass.utils import SmemAllocator

__all__ = ["SmemAllocator"]
