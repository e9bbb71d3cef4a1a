# pyright: reportAttributeAccessIssue=false
"""Waiting and sharing work between the CTAs of one launch.

Counters are in global memory and zero when the kernel starts. They only rise: nothing to reset, and
nobody of one phase is confused with somebody of the next.

A CTA may wait for work of others only if they run. A cooperative launch promises it of all: it
waits until they fit, whatever other streams hold. In a plain launch it is so for those who took
their numbers from a counter before: `next_item`, then waiting for smaller numbers only.
"""

import cutlass.cute as cute
from cutlass import Int32


@cute.jit
def announce(counter):
    """Adds 1 when all threads of the CTA are here; who sees it sees what they wrote."""
    cute.arch.sync_threads()
    if cute.arch.thread_idx()[0] == 0:
        cute.arch.atomic_add(counter.llvm_ptr, Int32(1), sem="acq_rel", scope="gpu")


@cute.jit
def wait_for(counter, wanted):
    """Waits until the counter is at `wanted` or above, with all threads of the CTA."""
    if cute.arch.thread_idx()[0] == 0:
        seen = cute.arch.load(counter.llvm_ptr, Int32, sem="acquire", scope="gpu")
        while seen < wanted:
            seen = cute.arch.load(counter.llvm_ptr, Int32, sem="acquire", scope="gpu")
    cute.arch.sync_threads()


@cute.jit
def grid_barrier(counter, phase):
    """Waits until all CTAs came here for the phase-th time, from 1 on; their writes are visible."""
    x, y, z = cute.arch.grid_dim()
    announce(counter)
    wait_for(counter, x * y * z * phase)


@cute.jit
def next_item(counter, shared):
    """The next number of a counter, the same for all threads of the CTA; shared: an int32."""
    cute.arch.sync_threads()
    if cute.arch.thread_idx()[0] == 0:
        shared[0] = cute.arch.atomic_add(counter.llvm_ptr, Int32(1), sem="relaxed", scope="gpu")
    cute.arch.sync_threads()
    return shared[0]
