# pyright: reportAttributeAccessIssue=false
"""An FP4 layer as one persistent cooperative launch: the stages of the pipeline between barriers.

    phase     sort | quantise, where FC1 takes codes | FC1 | FC2 with the sums of tokens, each with
              all CTAs, a grid barrier after each but the last
    work      static: item, item + CTAs, ..; dynamic: FC1 and FC2 take items from a counter, so that
              CTAs with short tiles take more
    counters  sync [0] arrivals, [1] and [2] items of FC1 and FC2, from [4] on the progress of FC2;
              zero before the launch

The stages are those of the pipeline, and so are all bits of the result. Saves four launches where
launches are what a layer costs; a CTA more than multiprocessors would only wait.

Rejected: FC1 and FC2 of a slice of the intermediate in one CTA, without a barrier: it adds up
I / 128 partial results of every output through memory, not in a fixed order.
"""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Int32, const_expr

from cutemoe.dsl.grid import grid_barrier, next_item
from cutemoe.dsl.memory import SmemAllocator
from cutemoe.moe.cute_nvfp4_fc1 import FC1
from cutemoe.moe.cute_nvfp4_fc2 import FC2
from cutemoe.moe.cute_nvfp4_plan import FusedConfig
from cutemoe.moe.cute_nvfp4_rows import Quantise
from cutemoe.moe.cute_nvfp4_sort import Sort


class Fused:
    """The kernel for one FusedConfig."""

    def __init__(self, c: FusedConfig):
        self.threads = c.fc1.tile.threads
        self.dynamic = c.dynamic
        self.sort = Sort(c.sort, self.threads // 32)
        self.quantise = Quantise(c.quantise, self.threads)
        self.fc1, self.fc2 = FC1(c.fc1), FC2(c.fc2)

    @cute.jit
    def __call__(
        self,
        call: tuple,
        rows: tuple,
        xq: tuple,
        w13: tuple,
        mid: tuple,
        w2: tuple,
        mSync: cute.Tensor,
        numbers: tuple,
        ctas: Int32,
        stream: cuda.CUstream,
    ):
        """See `kernel`; `ctas` at most what fits the device at once."""
        self.kernel(call, rows, xq, w13, mid, w2, mSync, numbers).launch(  # pyright: ignore
            grid=[ctas, 1, 1],
            block=[self.threads, 1, 1],
            min_blocks_per_mp=1,
            cooperative=True,
            stream=stream,
        )

    @cute.kernel
    def kernel(self, call, rows, xq, w13, mid, w2, mSync, numbers):
        """The whole layer.

        call: x, ids, weights, out, y (see FC2); rows: as of Sort; xq: codes and scales as bytes and
        as words [R, ..] (FC1 and quantise), mid: the same of the FC1 output; w13: codes, scale
        words, factor, multipliers of x and of mid, bias, (alpha, beta, limit); w2: codes, scale
        words, factor, bias; numbers: expert_offset, E, combiners (see FC2), rows of a tile. Where
        FC1 takes numbers, xq is None and mid its output alone.
        """
        mX, mIds, mW, mO, mY = call
        mSlots, mStart, mTiles, mCount = rows
        offset, experts, _, block_m = numbers
        cta, ctas = cute.arch.block_idx()[0], cute.arch.grid_dim()[0]
        smem = SmemAllocator()
        stages = smem.allocate(self.fc1.t.smem_bytes, byte_alignment=128)
        shared = cute.make_tensor(smem.allocate_array(Int32, 1), cute.make_layout((1,)))
        counts = cute.make_ptr(Int32, stages.toint(), cute.AddressSpace.smem, assumed_align=128)
        base = stages.toint()
        arrivals = mSync.iterator
        self.sort.body(mIds, rows, offset, experts, block_m, counts)
        grid_barrier(arrivals, 1)
        tiles = (mTiles, mCount, mSlots)
        if const_expr(xq is None):
            of_x = (mX, mIds.shape[1], w13[0], w13[1])
            self.fc1_tiles(of_x, tiles, w13, mid, mSync, shared, base)
            grid_barrier(arrivals, 2)
            of_mid = (mid[0], None, w2[0], w2[1])
        else:
            live = mStart[experts]
            for row in range(cta, live, ctas):
                self.quantise.row(mX, mIds, mSlots, w13[3], xq[2], xq[1], offset, row)
            grid_barrier(arrivals, 2)
            of_x, result = (xq[0], xq[3], w13[0], w13[1]), (mid[2], mid[1])
            self.fc1_tiles(of_x, tiles, w13, result, mSync, shared, base)
            grid_barrier(arrivals, 3)
            of_mid = (mid[0], mid[3], w2[0], w2[1])
        out = (mIds, mW, mO)
        self.fc2_items(of_mid, tiles, w13, w2, mY, out, mSync, numbers[:3], shared, base)

    @cute.jit
    def fc1_tiles(self, operands, tiles, w13, result, mSync, shared, base):
        """All of FC1."""
        n = self.fc1.programs(operands, tiles)
        multipliers = (w13[2], w13[3], w13[4])
        program = self.first_program(mSync.iterator + 1, shared)
        while program < n:
            self.fc1.body(operands, tiles, multipliers, w13[5], w13[6], result, program, base)
            program = self.next_program(program, mSync.iterator + 1, shared)

    @cute.jit
    def fc2_items(self, operands, tiles, w13, w2, mY, out, mSync, numbers, shared, base):
        """All of FC2 and the sums of tokens."""
        n = self.fc2.items(tiles, mY, out[2], numbers[2])
        item = self.first_program(mSync.iterator + 2, shared)
        while item < n:
            self.fc2.item(
                operands, tiles, (w2[2], w13[4]), w2[3], mY, out, mSync, numbers, item, base
            )
            item = self.next_program(item, mSync.iterator + 2, shared)

    def first_program(self, counter, shared):
        """The first tile of this CTA."""
        return next_item(counter, shared) if self.dynamic else Int32(cute.arch.block_idx()[0])

    @cute.jit
    def next_program(self, program, counter, shared):
        """The next tile of this CTA, when all its threads are done with the last."""
        if const_expr(self.dynamic):
            program = next_item(counter, shared)
        else:
            cute.arch.sync_threads()
            program = program + cute.arch.grid_dim()[0]
        return program
