# pyright: reportAttributeAccessIssue=false
"""Few routed rows, sorted by every CTA for itself: a launch costs more than sorting them again.

A thread has a slot. It compares its expert with those of all slots, unrolled, and keeps the answers
as bits: which slots have a smaller one, which the same. Places, ranks and tiles are counts of bits.
With loops that add, which wait for shared memory in each round, it took 1.3 us of the 19 of FC1
at 6 slots and 1.6 at 24 (H200, 2026-11-30, by %globaltimer).

Rejected: a named barrier of the threads that have slots. It is no faster, and racecheck then takes
what barriers of the whole CTA keep apart for races.
"""

import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32, const_expr, range_constexpr

from cutemoe.gemm.cute_plan import MOST_SORTED, Config

# the key of a slot that is skipped
_SKIPPED = 0x7FFFFFFF
_WORDS = MOST_SORTED // 32


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

        scratch: Int32 pointer to MOST_SORTED + 4 words of shared memory that are free."""
        tid, _, _ = cute.arch.thread_idx()
        sSlot = cute.make_tensor(shared.slots.data_ptr(), cute.make_layout(MOST_SORTED))
        tiles = cute.make_layout((MOST_SORTED, 3), stride=(3, 1))
        sTile = cute.make_tensor(shared.tiles.data_ptr(), tiles)
        sCount = cute.make_tensor(shared.count.data_ptr(), cute.make_layout(1))
        sKey = cute.make_tensor(scratch, cute.make_layout((4, MOST_SORTED // 4)))
        # by slot: whether a tile begins with it
        sFirst = cute.make_tensor(scratch + MOST_SORTED, cute.make_layout(_WORDS))
        total = mIds.shape[0] * mIds.shape[1]
        key = self.key(mIds, offset, experts, total)
        if tid < MOST_SORTED:
            sKey[tid % 4, tid // 4] = key
        cute.arch.sync_threads()
        less, same, own = [Uint32(0)] * _WORDS, [Uint32(0)] * _WORDS, Int32(0)
        if tid < MOST_SORTED:
            less, same, own = self.counted(sKey, key, total)
            begins = key != _SKIPPED and self.bits(same) % self.rows == 0
            mask = cute.arch.vote_ballot_sync(begins)
            if tid % 32 == 0:
                sFirst[tid // 32] = Int32(mask)
        cute.arch.sync_threads()
        first = [Uint32(sFirst[w]) for w in range(_WORDS)]
        rank = self.bits(same)
        at = self.bits(less) + rank
        if key != _SKIPPED:
            sSlot[at] = tid
        if key != _SKIPPED and rank % self.rows == 0:
            tile = self.bits([f & (a | b) for f, a, b in zip(first, less, same)])
            left = own - rank
            sTile[tile, 0] = key
            sTile[tile, 1] = at
            sTile[tile, 2] = left if left < self.rows else Int32(self.rows)
        if tid == 0:
            sCount[0] = self.bits(first)
        cute.arch.sync_threads()
        return sSlot, sTile, sCount

    @cute.jit
    def key(self, mIds, offset, experts, total):
        """Local expert of the slot of this thread, or _SKIPPED."""
        tid, _, _ = cute.arch.thread_idx()
        top_k = mIds.shape[1]
        key = Int32(_SKIPPED)
        if tid < total:
            token = tid // top_k
            expert = Int64(mIds[token, tid - token * top_k])
            if expert >= offset and expert < offset + experts:
                key = Int32(expert - offset)
        return key

    @cute.jit
    def counted(self, sKey, key, total):
        """Bits of the slots with a smaller key, of the earlier ones with the same, and how many
        have the same."""
        less, same, own = [], [], Int32(0)
        for w in range_constexpr(_WORDS):
            smaller, equal = self.compared(sKey, key, total, w)
            own += self.bits([equal])
            less.append(smaller)
            same.append(equal & self.earlier(w))
        return less, same, own

    @cute.jit
    def compared(self, sKey, key, total, word):
        """Bits of the slots of a word whose key is smaller, and of those with the same."""
        less, same = Uint32(0), Uint32(0)
        if total > 32 * word:
            rKey = cute.make_rmem_tensor((4,), Int32)
            for q in range_constexpr(8):
                cute.autovec_copy(sKey[None, 8 * word + q], rKey)
                for i in range_constexpr(4):
                    bit = const_expr(1 << (4 * q + i))
                    less |= Uint32(bit) if rKey[i] < key else Uint32(0)
                    same |= Uint32(bit) if rKey[i] == key else Uint32(0)
        return less, same

    def bits(self, words):
        """How many are set."""
        return sum([Int32(cute.arch.popc(w)) for w in words[1:]], Int32(cute.arch.popc(words[0])))

    @cute.jit
    def earlier(self, word):
        """Bits of a word that stand for slots before this thread's."""
        warp = cute.arch.thread_idx()[0] // 32
        mask = Uint32(cute.arch.lanemask_lt())
        mask = mask if warp == word else Uint32(0)
        return Uint32(0xFFFFFFFF) if warp > word else mask
