# pyright: reportAttributeAccessIssue=false
"""FC2 of an FP4 layer and the weighted sum of every token's slots, through a small scratch.

FC2 leaves float32 rows y in slot order; a token's sum takes its slots in ascending order with one
rounding, so nothing is added up by atomics and every run gives the same bits. y of a whole layer
would be by far its largest scratch. Instead it has room for some columns of all rows, in `slots`
parts that are used in turn:

    items     F(0) | F(1) with C(0) | F(2) with C(1) | .. | C(last)
    F(c)      tiles of rows times blocks of 128 of the columns of part c: GEMM, bias, store to y
    C(c)      `combiners` items: the sums of all tokens in these columns, in the midst of F(c + 1)
    waits     C(c) for all of F(c); the stores of F(c) for all of C(c - slots)

An item waits for items with smaller numbers only, and whoever has a number runs or is done: numbers
come from a counter, or in a cooperative launch in ascending order from the CTA's own. So nobody
waits forever, whatever other streams hold.

Rejected: one CTA for all experts of a token, which reads the weights once for every token; sums in
the order of experts, which is not that of slots; y in bf16, a second rounding.
"""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr, range_constexpr

from cutemoe.dsl.grid import announce, next_item, wait_for
from cutemoe.dsl.memory import SmemAllocator
from cutemoe.dsl.pdl import results_of_the_last_kernel
from cutemoe.moe.cute_nvfp4_gemm import ExpertGemm
from cutemoe.moe.cute_nvfp4_left import least
from cutemoe.moe.cute_nvfp4_plan import FC2Config
from cutemoe.moe.cute_nvfp4_rows import Combine


class FC2(ExpertGemm):
    """The kernel for one FC2Config."""

    def __init__(self, c: FC2Config):
        super().__init__(c.gemm)
        self.combine = Combine(c.rows, self.t.threads)

    @cute.jit
    def __call__(
        self,
        operands: tuple,
        tiles: tuple,
        multipliers: tuple | None,
        mBias,
        mY: cute.Tensor,
        call: tuple,
        mSync: cute.Tensor,
        numbers: tuple,
        programs: Int32,
        stream: cuda.CUstream,
    ):
        """See `kernel`; `programs` is at least the number of items."""
        self.kernel(operands, tiles, multipliers, mBias, mY, call, mSync, numbers).launch(  # pyright: ignore
            grid=[programs, 1, 1],
            block=[self.t.threads, 1, 1],
            min_blocks_per_mp=1,
            use_pdl=self.pdl,
            stream=stream,
        )

    @cute.kernel
    def kernel(self, operands, tiles, multipliers, mBias, mY, call, mSync, numbers):
        """out [T, H] = sum over slots of weight * (mid w2^T + b2), one item a CTA.

        Operands, tiles, multipliers and bias as in FC1, operands with mid (of numbers [R, I], and
        None for they are sorted) and w2; y float32
        [slots * R, columns]; call: ids, weights, out; sync: see `Progress`; numbers: expert_offset,
        E, combiners.
        """
        results_of_the_last_kernel(self.pdl)
        smem = SmemAllocator()
        base = smem.allocate(self.t.smem_bytes, byte_alignment=128).toint()
        shared = cute.make_tensor(smem.allocate_array(Int32, 1), cute.make_layout((1,)))
        item = next_item(mSync.iterator + 2, shared)
        if item < self.items(tiles, mY, call[2], numbers[2]):
            self.item(operands, tiles, multipliers, mBias, mY, call, mSync, numbers, item, base)

    def items(self, tiles, mY, mO, combiners):
        """F and C of all parts."""
        H, columns = mO.shape[1], mY.shape[1]
        each = tiles[1][0] * cute.ceil_div(columns, self.c.outputs) + combiners
        return cute.ceil_div(H, columns) * each

    @cute.jit
    def item(self, operands, tiles, multipliers, mBias, mY, call, mSync, numbers, item, base):
        """One item; base: address of shared memory."""
        mO, combiners, R = call[2], numbers[2], tiles[2].shape[0]
        columns, H = mY.shape[1], mO.shape[1]
        wide = cute.ceil_div(columns, self.c.outputs)
        n, chunks = tiles[1][0] * wide, cute.ceil_div(H, columns)
        filled, emptied = mSync.iterator + 4, mSync.iterator + 4 + chunks
        slots = mY.shape[0] // R
        # after F(0), steps of F(step) with C(step - 1) in its midst, and C alone at the end
        step, i = Int32(0), item
        if item >= n:
            step = 1 + (item - n) // (n + combiners)
            i = (item - n) % (n + combiners)
        before = Int32(n) if step == 0 else (n // 2 if step < chunks else Int32(0))
        if i < before or i >= before + combiners:
            i = i if i < before else i - combiners
            block = step * wide + i % wide
            if block * self.c.outputs < H:
                work = self.work(tiles, i // wide, block)
                acc = self.product(operands, work, base)
                if step >= slots:
                    wait_for(emptied + (step - slots), combiners)
                gY = cute.domain_offset((step % slots * Int64(R), -step * columns), mY)
                self.finish(acc, work, tiles[2], multipliers, mBias, gY, H)
                announce(filled + step)
        else:
            c = step - 1
            blocks = least(wide, cute.ceil_div(H, self.c.outputs) - c * wide)
            wait_for(filled + c, tiles[1][0] * blocks)
            gY = cute.domain_offset((c % slots * Int64(R), 0), mY)
            end = least(columns, H - c * columns)
            share = (i - before, combiners)
            self.combine.columns(gY, call, numbers, c * columns, end, share)
            announce(emptied + c)

    @cute.jit
    def finish(self, acc, work, mSlots, multipliers, mBias, mY, H):
        """Bias and store, two neighbouring outputs of a row at a time."""
        mFactor, mMid = self.each(multipliers, 2)
        m = self.multiplier(mFactor, mMid, work.expert)
        row, n0, t = self.position()
        rY = cute.make_rmem_tensor((2,), Float32)
        for i in range_constexpr(self.m_tiles):
            for h in range_constexpr(2):
                r = row + 16 * i + 8 * h
                if r < work.rows:
                    gY = mY[Int64(mSlots[work.first + r]), None]
                    for j in range_constexpr(self.n_tiles):
                        n = work.j0 + n0 + 8 * j + 2 * t
                        if n < H:
                            for e in range_constexpr(2):
                                rY[e] = self.times(acc[i][j][2 * h + e], m)
                                if const_expr(self.c.bias):
                                    rY[e] = rY[e] + mBias[work.expert, n + e]
                            cute.autovec_copy(rY, cute.local_tile(gY, (2,), (n // 2,)))
