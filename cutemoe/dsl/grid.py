# pyright: reportAttributeAccessIssue=false
"""Waiting and sharing work between the CTAs of one cooperative launch.

Both use counters in global memory that are zero when the kernel starts. Only a cooperative launch
promises that all CTAs run at once: it waits until they fit, whatever other streams hold.
"""

import cutlass.cute as cute
from cutlass import Int32


@cute.jit
def grid_barrier(counter, phase):
    """Waits until all CTAs came here for the phase-th time, from 1 on; their writes are visible.

    The counter only rises: nothing to reset, and no CTA of the next phase is confused with one of
    this phase.
    """
    x, y, z = cute.arch.grid_dim()
    wanted = x * y * z * phase
    cute.arch.sync_threads()
    if cute.arch.thread_idx()[0] == 0:
        cute.arch.atomic_add(counter.llvm_ptr, Int32(1), sem="acq_rel", scope="gpu")
        seen = cute.arch.load(counter.llvm_ptr, Int32, sem="acquire", scope="gpu")
        while seen < wanted:
            seen = cute.arch.load(counter.llvm_ptr, Int32, sem="acquire", scope="gpu")
    cute.arch.sync_threads()


@cute.jit
def next_item(counter, shared):
    """The next number of a counter, the same for all threads of the CTA; shared: an int32."""
    cute.arch.sync_threads()
    if cute.arch.thread_idx()[0] == 0:
        shared[0] = cute.arch.atomic_add(counter.llvm_ptr, Int32(1), sem="relaxed", scope="gpu")
    cute.arch.sync_threads()
    return shared[0]
