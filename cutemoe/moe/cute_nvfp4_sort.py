# pyright: reportAttributeAccessIssue=false
"""From expert ids to sorted rows and tiles of rows: one kernel, the same bits in every run.

A warp an expert. Every CTA counts all ids, so its warps know where their rows and tiles start
without waiting for another CTA; then each warp walks through the ids until it has found its rows,
ranking 32 at once by a ballot. Counts use atomics of shared memory, whose sum has no order.
"""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Int32, Uint32, const_expr, range_constexpr

from cutemoe.dsl.memory import SmemAllocator
from cutemoe.moe.cute_nvfp4_plan import SortConfig
from cutemoe.moe.cute_nvfp4_rows import Ids

# ids that a lane has in flight
AHEAD = 8


class Sort:
    """The kernel for one SortConfig; `warps` of a CTA."""

    def __init__(self, c: SortConfig, warps: int = 16):
        self.bins, self.ids, self.warps, self.pdl = c.bins, Ids(c.flat), warps, c.pdl

    @cute.jit
    def __call__(
        self,
        mIds: cute.Tensor,
        rows: tuple,
        mSync: cute.Tensor,
        offset: Int32,
        experts: Int32,
        block_m: Int32,
        stream: cuda.CUstream,
    ):
        """ids [T, K]; rows: sorted slots [R], starts [E + 1], tiles [.., 3], tile count [1]; sync:
        counters of the launches to come, zeroed."""
        self.kernel(mIds, rows, mSync, offset, experts, block_m).launch(  # pyright: ignore
            grid=[cute.ceil_div(experts, self.warps), 1, 1],
            block=[32 * self.warps, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, mIds, rows, mSync, offset, experts, block_m):
        if const_expr(self.pdl):
            # not launched early itself: whatever ran before may not know of it
            cute.arch.griddepcontrol_launch_dependents()
        if cute.arch.block_idx()[0] == 0:
            for i in range(cute.arch.thread_idx()[0], mSync.shape[0], 32 * self.warps):
                mSync[i] = Int32(0)
        smem = SmemAllocator().allocate_array(Int32, self.bins)
        self.body(mIds, rows, offset, experts, block_m, smem)

    @cute.jit
    def body(self, mIds, rows, offset, experts, block_m, smem):
        """The experts of this CTA; smem: `bins` int32."""
        tid, _, _ = cute.arch.thread_idx()
        first_expert = cute.arch.block_idx()[0] * self.warps
        threads = const_expr(32 * self.warps)
        counts = cute.make_tensor(smem, cute.make_layout((self.bins,)))
        for i in range(tid, self.bins, threads):
            counts[i] = Int32(0)
        cute.arch.sync_threads()
        R = rows[0].shape[0]
        step = threads * AHEAD
        for first in range(tid, R, step):
            local = [
                self.local(mIds, first + i * threads, R, offset, experts) for i in range(AHEAD)
            ]
            for i in range_constexpr(AHEAD):
                if local[i] >= 0:
                    cute.arch.atomic_add((counts.iterator + local[i]).llvm_ptr, Int32(1))
        cute.arch.sync_threads()
        warp = cute.arch.make_warp_uniform(tid // 32)
        for expert in range(first_expert + warp, experts, cute.arch.grid_dim()[0] * self.warps):
            self.place(mIds, rows, counts, expert, offset, experts, block_m)

    @cute.jit
    def local(self, mIds, slot, R, offset, experts):
        """Local expert of a slot, or -1 where it is to be skipped or past the end."""
        # slots wrap where R is near 2^31
        inside = slot >= 0 and slot < R
        expert = self.ids.at(mIds, slot if inside else Int32(0))
        # no id is subtracted from unless it is in range
        live = inside and expert >= offset and expert < offset + experts
        return Int32(expert) - offset if live else Int32(-1)

    @cute.jit
    def place(self, mIds, rows, counts, expert, offset, experts, block_m):
        """Start, tiles and sorted slots of one expert, by one warp."""
        mSlots, mStart, mTiles, mCount = rows
        lane = cute.arch.lane_idx()
        start, tile = Int32(0), Int32(0)
        for i in range(lane, expert, 32):
            start += counts[i]
            tile += cute.ceil_div(counts[i], block_m)
        for s in range_constexpr(5):
            start += cute.arch.shuffle_sync_bfly(start, offset=1 << s)
            tile += cute.arch.shuffle_sync_bfly(tile, offset=1 << s)
        mine = counts[expert]
        tiles = cute.ceil_div(mine, block_m)
        if lane == 0:
            mStart[expert] = start
            if expert == experts - 1:
                mStart[experts] = start + mine
                mCount[0] = tile + tiles
        for i in range(lane, tiles, 32):
            left = mine - i * block_m
            mTiles[tile + i, 0] = expert
            mTiles[tile + i, 1] = start + i * block_m
            mTiles[tile + i, 2] = left if left < block_m else block_m
        R, end = mSlots.shape[0], start + mine
        before = (Uint32(1) << Uint32(lane)) - Uint32(1)
        first = Int32(0)
        while start < end and first < R:
            local = [
                self.local(mIds, first + lane + 32 * i, R, offset, experts) for i in range(AHEAD)
            ]
            for i in range_constexpr(AHEAD):
                own = local[i] == expert
                found = Uint32(cute.arch.vote_ballot_sync(own))
                if own:
                    mSlots[start + Int32(cute.arch.popc(found & before))] = first + lane + 32 * i
                start += Int32(cute.arch.popc(found))
            first += 32 * AHEAD
