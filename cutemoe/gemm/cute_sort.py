# pyright: reportAttributeAccessIssue=false
"""Few routed rows, sorted by every CTA for itself: a launch costs more than sorting them again."""

import cutlass.cute as cute
from cutlass import Int32, Int64

from cutemoe.gemm.cute_plan import MOST_SORTED, Config

# the key of a slot that is skipped
_SKIPPED = 0x7FFFFFFF


class SlotSort:
    """Slots of every local expert in ascending order, and tiles of them, as sort.py writes them."""

    def __init__(self, c: Config):
        self.rows = c.tile.block_m
        n = MOST_SORTED if c.ids else 1

        @cute.struct
        class Storage:
            slots: cute.struct.MemRange[Int32, n]  # pyright: ignore
            # expert, first row, rows
            tiles: cute.struct.MemRange[Int32, 3 * n]  # pyright: ignore
            count: cute.struct.MemRange[Int32, 1]  # pyright: ignore

        self.Storage = Storage

    @cute.jit
    def __call__(self, mIds, offset, experts, shared, scratch):
        """slots, tiles and count in shared memory, of ids [T, K]; all threads of the CTA.

        scratch: Int32 pointer to 2 MOST_SORTED words of shared memory that are free."""
        tid, _, _ = cute.arch.thread_idx()
        top_k = mIds.shape[1]
        total = mIds.shape[0] * top_k
        sKey = cute.make_tensor(scratch, cute.make_layout(MOST_SORTED))
        # by place in the order: whether a tile begins there
        sFirst = cute.make_tensor(scratch + MOST_SORTED, cute.make_layout(MOST_SORTED))
        sSlot = cute.make_tensor(shared.slots.data_ptr(), cute.make_layout(MOST_SORTED))
        tiles = cute.make_layout((MOST_SORTED, 3), stride=(3, 1))
        sTile = cute.make_tensor(shared.tiles.data_ptr(), tiles)
        sCount = cute.make_tensor(shared.count.data_ptr(), cute.make_layout(1))
        key = Int32(_SKIPPED)
        if tid < total:
            expert = Int64(mIds[tid // top_k, tid % top_k])
            if expert >= offset and expert < offset + experts:
                key = Int32(expert - offset)
            sKey[tid] = key
        cute.arch.sync_threads()
        less, rank, own, live = Int32(0), Int32(0), Int32(0), Int32(0)
        if tid < total:
            for s in range(total):
                k = sKey[s]
                less += Int32(1) if k < key else Int32(0)
                own += Int32(1) if k == key else Int32(0)
                rank += Int32(1) if k == key and s < tid else Int32(0)
                live += Int32(1) if k != _SKIPPED else Int32(0)
        at = less + rank
        begins = key != _SKIPPED and rank % self.rows == 0
        if key != _SKIPPED:
            sSlot[at] = tid
            sFirst[at] = Int32(1) if begins else Int32(0)
        cute.arch.sync_threads()
        if begins:
            tile = Int32(0)
            for s in range(at):
                tile += sFirst[s]
            left = own - rank
            sTile[tile, 0] = key
            sTile[tile, 1] = at
            sTile[tile, 2] = left if left < self.rows else Int32(self.rows)
        if tid == 0:
            count = Int32(0)
            for s in range(live):
                count += sFirst[s]
            sCount[0] = count
        cute.arch.sync_threads()
        return sSlot, sTile, sCount
