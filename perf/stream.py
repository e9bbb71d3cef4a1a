# pyright: reportGeneralTypeIssues=false
"""A Triton kernel that does nothing but read memory, for the bandwidth ceiling."""

import triton
import triton.language as tl


@triton.jit
def sum_blocks(x_ptr, out_ptr, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """out[p] = sum of the UNROLL * BLOCK consecutive float32 of program p."""
    p = tl.program_id(0)
    base = p.to(tl.int64) * BLOCK * UNROLL
    offsets = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in tl.static_range(UNROLL):
        total += tl.load(x_ptr + base + i * BLOCK + offsets)
    tl.store(out_ptr + p, tl.sum(total, axis=0))
