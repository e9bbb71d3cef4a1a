"""The mixed-input GEMM of both expert layers on SM90: weights times gathered rows of tokens.

Weights are the A operand of wgmma, 64 rows an instruction, decoded in registers; tokens are its N
dimension, so that a tile of few tokens wastes no tensor core rows. Persistent: CTA c takes work
items c, c + grid, ..; an item is a tile of tokens of one expert and a block of weight rows.

Roles    weights (1 warp, 1 lane at work) | tokens (1 or 3 warps) | math (2 to 4 warpgroups)
Pipes    full:  weights -> math by bytes of bulk copies and 1 arrival of their lane;
                tokens -> math, 1 arrival of every warp, `lag` stages after its cp.async; packed
                ones as weights
         empty: math -> both, 1 arrival of every math warp
Stage    128 columns: two units of the weight layout for every block of 64 rows, and the tile's
         tokens K-major in swizzled rows of 128 bytes
Per k    weights: wait empty, expect bytes, copy | tokens: wait empty, cp.async; wait for the
         stage `lag` before, fence, arrive; packed as weights | math: wait full; for every step of
         32 columns (fp8: 64) and block: decode, two wgmma, and wait until those before are done,
         whose registers the next decode takes (four sets of them: half of the steps); release the
         stage before
Per item math: bias, activation, store, while the others are at the next items already

Where scales multiply sums of a group (int4, and fp8), wgmma starts every group from zero in
registers of its own. When the first step of the next group is decoded, a warpgroup waits for the
sums and adds them, scaled, to its accumulators; the tensor core is busy with other warpgroups.
wgmma of fp8 aligns the products of 32 columns and the sum so far to the largest of them and cuts
off what is more than 12 bits below it, which is why no sum runs over more than 128 columns: each
product loses less than 2^-12 of the largest. tests/gemm/test_fp8_sums.py has the model.

Sums run over k in ascending order whatever the tile, so a token has the same bits in every batch.
"""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import (
    BFloat16,
    Float8E4M3FN,
    Float16,
    Float32,
    Int32,
    Int64,
    Uint8,
    Uint32,
    const_expr,
    range_constexpr,
)
from cutlass.cute.nvgpu import OperandMajorMode, warpgroup

from cutemoe.dsl.memory import SmemAllocator
from cutemoe.gemm.cute_async import advance, bulk_copy, copy_16, fence_async, tile_start
from cutemoe.gemm.cute_decode import hook, opaque
from cutemoe.gemm.cute_epilogue import Epilogue
from cutemoe.gemm.cute_plan import SPILLED_CODES, STAGE_COLUMNS, STAGE_UNITS, Config
from cutemoe.gemm.cute_sort import SlotSort
from cutemoe.layouts.sm90_rs_w4 import CODE_BYTES, COLUMNS

OPERANDS = {"bf16": BFloat16, "fp16": Float16, "fp8": Float8E4M3FN}
# named barrier of the warps that load tokens
_TOKENS = 1


class ExpertGemm:
    """out[row, j] = activation(factor * sum over k of w[expert, .., k] * x[row, k] + bias)."""

    def __init__(self, c: Config):
        self.c = c
        self.t = c.tile
        self.hook = hook(c.recipe.weight, c.recipe.activations, c.recipe.group)
        self.epilogue = Epilogue(c)
        self.sort = SlotSort(c)
        self.operand = OPERANDS[c.recipe.activations]
        # columns of one wgmma, bytes of a token, 16-byte pieces of its part of a stage
        self.mma_k = 32 // c.recipe.width
        self.width = c.recipe.width
        self.chunks = STAGE_COLUMNS * self.width // 16
        # scales of a group of both units of a stage
        self.shared_scales = c.recipe.weight == "int4" and self.hook.group == 128
        self.stages = c.tile.stages
        self.w_bytes, self.x_bytes = c.stage_bytes
        # warps that load tokens: a lane has 16 bytes of a row, or one lane all of a tile
        self.loaders = 1 if c.packed_x or self.t.block_m <= 32 else 3
        self.threads = 128 * (self.t.warpgroups + 1)
        self.sets = self.t.sets if self.hook.group == 0 else 2
        # codes of a stage are loaded first
        int4_fp8 = c.recipe.weight == "int4" and c.recipe.width == 1
        self.ahead = self.sets == 4 or (int4_fp8 and c.tile.rows not in SPILLED_CODES)

        @cute.struct
        class Storage:
            x: cute.struct.Align[cute.struct.MemRange[Uint8, self.stages * self.x_bytes], 1024]  # pyright: ignore
            w: cute.struct.Align[cute.struct.MemRange[Uint8, self.stages * self.w_bytes], 128]  # pyright: ignore
            full: cute.struct.MemRange[Int64, self.stages]  # pyright: ignore
            # one more than there are stages: what the first item releases before its first stage
            empty: cute.struct.MemRange[Int64, self.stages + 1]  # pyright: ignore
            rows: cute.struct.Align[cute.struct.MemRange[Int64, self.t.block_m], 32]  # pyright: ignore
            order: self.sort.Storage  # pyright: ignore

        self.Storage = Storage

    @cute.jit
    def __call__(
        self,
        mX,
        mW,
        factor,
        x_scale,
        bias,
        work,
        mO,
        params,
        top_k: Int32,
        ctas: Int32,
        stream: cuda.CUstream,
    ):
        """x [.., K], fp8 as bytes; w [E, row blocks, column blocks, unit]; factor [E]; x_scale [E]
        or [rows of x]; bias [E, rows of w]; work: slots, tiles, count, or ids and expert_offset;
        params: alpha, beta, limit, each Float32 or [E]."""
        self.kernel(mX, mW, (factor, x_scale, bias, top_k), work, mO, params).launch(  # pyright: ignore
            grid=[ctas, 1, 1],
            block=[self.threads, 1, 1],
            min_blocks_per_mp=self.t.ctas,
            use_pdl=True,
            preferred_smem_carveout=100,
            stream=stream,
        )

    @cute.kernel
    def kernel(self, mX, mW, extras, work, mO, params):
        shared = SmemAllocator().allocate(self.Storage)
        warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
        full, empty = shared.full.data_ptr(), shared.empty.data_ptr()  # pyright: ignore
        if warp == 0:
            with cute.arch.elect_one():
                for s in range_constexpr(self.stages):
                    cute.arch.mbarrier_init(full + s, 1 + self.loaders)
                    cute.arch.mbarrier_init(empty + s, 4 * self.t.warpgroups)
                cute.arch.mbarrier_init(empty + self.stages, 4 * self.t.warpgroups)
        cute.arch.mbarrier_init_fence()
        cute.arch.sync_threads()
        if const_expr(not self.c.early):
            cute.arch.griddepcontrol_wait()
        if const_expr(self.c.ids != ""):
            scratch = cute.recast_ptr(shared.x.data_ptr(), dtype=Int32)  # pyright: ignore
            order = shared.order  # pyright: ignore
            work = self.sort(work[0], work[1], mW.shape[0], order, scratch)
        cute.arch.griddepcontrol_launch_dependents()
        blocks = cute.ceil_div(mW.shape[1], self.t.row_blocks)
        total = work[2][0] * blocks
        if warp < 4:
            cute.arch.setmaxregister_decrease(self.t.registers[0])
            if warp == 0:
                self.load_weights(mW, work[1], shared, full, empty, blocks, total)
            elif const_expr(self.c.packed_x):
                if warp == 1:
                    self.load_packed(mX, mW, work[1], shared, full, empty, blocks, total)
            elif warp <= self.loaders:
                self.load_tokens(mX, mW, work, shared, full, empty, blocks, total, extras[3])
        else:
            cute.arch.setmaxregister_increase(self.t.registers[1])
            self.multiply(mW, extras, work, mO, params, shared, full, empty, blocks, total)

    # ---- load

    @cute.jit
    def load_weights(self, mW, mT, shared, full, empty, blocks, total):
        """Bulk copies of the row blocks of every item."""
        stage, phase = Int32(0), Int32(1)
        row_blocks, units = mW.shape[1], mW.shape[2]
        unit = self.c.recipe.unit
        lane = cute.arch.lane_idx()
        item, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        base = mW.iterator.toint()
        w = shared.w.data_ptr().toint()
        while item < total:
            tile = item // blocks
            first = (item - tile * blocks) * self.t.row_blocks
            expert = mT[tile, 0]
            if expert >= 0:
                src = base + (Int64(expert) * row_blocks + first) * Int64(units * unit)
                have = row_blocks - first
                have = have if have < self.t.row_blocks else Int32(self.t.row_blocks)
                for u in range(0, units, STAGE_UNITS):
                    n = units - u
                    nbytes = (n if n < STAGE_UNITS else Int32(STAGE_UNITS)) * unit
                    cute.arch.mbarrier_wait(empty + stage, phase)
                    if lane == 0:
                        cute.arch.mbarrier_arrive_and_expect_tx(full + stage, have * nbytes)
                        dst = w + stage * self.w_bytes
                        for b in range_constexpr(self.t.row_blocks):
                            if b < have:
                                bulk_copy(
                                    dst + b * STAGE_UNITS * unit,
                                    src + Int64(b * units + u) * unit,
                                    nbytes,
                                    full + stage,
                                    self.t.block_m <= 64,
                                )
                    stage, phase = advance(stage, phase, self.stages)
            item += grid

    @cute.jit
    def load_tokens(self, mX, mW, work, shared, full, empty, blocks, total, top_k):
        """cp.async of 16 bytes a lane, 8 rows at a time; columns past K are 0, rows past the last
        are left as they are: what wgmma makes of them is a column that nobody stores.

        Within 8 rows places are fixed: swizzled addresses cost nothing, and one load brings the
        addresses of all rows of a lane."""
        slots, mT, _ = work
        stage, phase = Int32(0), Int32(1)
        # stages issued, and the oldest that math has not been told of
        issued, oldest = Int32(0), Int32(0)
        lag = self.t.lag
        if const_expr(self.c.early):
            cute.arch.griddepcontrol_wait()
        K = mX.shape[1]
        stages = cute.ceil_div(mW.shape[2], STAGE_UNITS)
        threads = 32 * self.loaders
        p = cute.arch.thread_idx()[0] - 32
        # a copy of the warp has `each` rows: this lane row `part` of them
        each = 32 // self.chunks
        copies = 8 // each
        part, chunk = p % 32 // self.chunks, p % self.chunks
        item, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        base = mX.iterator.toint()
        x = shared.x.data_ptr().toint() + chunk // 8 * (self.t.block_m * 128)
        at = [
            x + (each * i + part) * 128 + ((chunk % 8) ^ (each * i + part)) * 16
            for i in range(copies)
        ]
        # [8 rows, part, copy]
        layout = cute.make_layout((copies, 8 // copies, self.t.block_m // 8))
        sRow = cute.make_tensor(shared.rows.data_ptr(), layout)
        while item < total:
            tile = item // blocks
            expert, first, n = mT[tile, 0], mT[tile, 1], mT[tile, 2]
            if expert >= 0:
                cute.arch.barrier(barrier_id=_TOKENS, number_of_threads=threads)
                for r in range(p, n, threads):
                    row = first + r
                    if const_expr(self.c.gather):
                        row = slots[row] // top_k
                    address = base + Int64(row) * Int64(mX.stride[0]) * self.width
                    sRow[r % 8 // each, r % each, r // 8] = address
                cute.arch.barrier(barrier_id=_TOKENS, number_of_threads=threads)
                for s in range(stages):
                    k = s * STAGE_COLUMNS + chunk * (16 // self.width)
                    nbytes = Int32(16) if k < K else Int32(0)
                    k = k if k < K else Int32(0)
                    cute.arch.mbarrier_wait(empty + stage, phase)
                    for eight in range(p // 32, cute.ceil_div(n, 8), self.loaders):
                        rRow = cute.make_rmem_tensor((copies,), Int64)
                        cute.autovec_copy(sRow[None, part, eight], rRow)
                        moved = stage * self.x_bytes + eight * 1024
                        left = n - 8 * eight - part
                        for i in range_constexpr(copies):
                            source = rRow[i] + Int64(k) * self.width
                            copy_16(at[i] + moved, source, nbytes, left, each * i)
                    cute.arch.cp_async_commit_group()
                    if issued >= lag:
                        cute.arch.cp_async_wait_group(lag)
                        oldest = self.arrive(full, oldest)
                    issued += 1
                    stage, phase = advance(stage, phase, self.stages)
            item += grid
        cute.arch.cp_async_wait_group(0)
        for _ in range(issued if issued < lag else Int32(lag)):
            oldest = self.arrive(full, oldest)

    @cute.jit
    def load_packed(self, mX, mW, mT, shared, full, empty, blocks, total):
        """Bulk copies of tiles that are stored as a stage has them, one for each unit."""
        stage, phase = Int32(0), Int32(1)
        if const_expr(self.c.early):
            cute.arch.griddepcontrol_wait()
        # another kernel wrote them with plain stores
        fence_async()
        units = mW.shape[2]
        lane = cute.arch.lane_idx()
        item, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        # bytes of a row of a unit, and in shared memory of a unit
        row, apart = COLUMNS * self.width, self.x_bytes // STAGE_UNITS
        base = mX.iterator.toint()
        x = shared.x.data_ptr().toint()
        while item < total:
            tile = item // blocks
            expert, first, n = mT[tile, 0], mT[tile, 1], mT[tile, 2]
            if expert >= 0:
                src = tile_start(base, first, expert, tile, 8 * units * row)
                # rows that the tile lacks of 8 stay behind
                nbytes, each = n * row, cute.ceil_div(n, 8) * (8 * row)
                for u in range(0, units, STAGE_UNITS):
                    left = units - u
                    have = left if left < STAGE_UNITS else Int32(STAGE_UNITS)
                    cute.arch.mbarrier_wait(empty + stage, phase)
                    if lane == 0:
                        cute.arch.mbarrier_arrive_and_expect_tx(full + stage, have * nbytes)
                        dst = x + stage * self.x_bytes
                        for i in range_constexpr(STAGE_UNITS):
                            if i < have:
                                bulk_copy(dst + i * apart, src, nbytes, full + stage, False)
                            src += each
                    stage, phase = advance(stage, phase, self.stages)
            item += grid

    @cute.jit
    def arrive(self, full, stage):
        """This warp's tokens of the stage are there, for wgmma to read; the stage after it."""
        # cp.async writes through the generic proxy, wgmma reads through another
        cute.arch.fence_view_async_shared()
        cute.arch.sync_warp()
        if cute.arch.lane_idx() == 0:
            cute.arch.mbarrier_arrive(full + stage)
        stage += 1
        return stage if stage < self.stages else Int32(0)

    # ---- math

    @cute.jit
    def multiply(self, mW, extras, work, mO, params, shared, full, empty, blocks, total):
        """All items of this warpgroup, each with the width that its tokens need."""
        mT = work[1]
        done = Int32(0)
        stages = cute.ceil_div(mW.shape[2], STAGE_UNITS)
        item, _, _ = cute.arch.block_idx()
        grid, _, _ = cute.arch.grid_dim()
        last = total // blocks - 1
        tile = item // blocks
        at = tile if tile < last else last
        at = at if at > 0 else Int32(0)
        expert, first, n = mT[at, 0], mT[at, 1], mT[at, 2]
        while item < total:
            block = item - item // blocks * blocks
            # of the next item, so that nobody waits for it
            following = (item + grid) // blocks
            at = following if following < last else last
            after = (mT[at, 0], mT[at, 1], mT[at, 2])
            if expert >= 0:
                where = (expert, first, n, block, item // blocks)
                for i in range_constexpr(len(self.t.rows)):
                    low = self.t.rows[i - 1] if i > 0 else 0
                    if n > low and n <= self.t.rows[i]:
                        self.item(
                            self.t.rows[i], mW, extras, work[0], mO, params, shared, full, empty,
                            where, done,
                        )  # fmt: skip
                done += stages
            elif const_expr(self.c.zero_tail):
                self.epilogue.zeros(mO, first, n, block * self.t.row_blocks)
            item += grid
            expert, first, n = after

    @cute.jit
    def item(self, rows, mW, extras, slots, mO, params, shared, full, empty, where, done):
        """Sums of one item and what becomes of them; `rows` is known at compile time."""
        units = mW.shape[2]
        mma = cute.make_tiled_mma(cute.make_mma_atom(self.instruction(rows)))
        mma.set(warpgroup.Field.ACCUMULATE, True)
        tid = cute.arch.thread_idx()[0] - 128
        thr = mma.get_slice(tid % 128)
        rB = mma.make_fragment_B(thr.partition_B(self.tokens(shared, rows)))
        shape = thr.partition_shape_C((64, rows))
        acc = [cute.make_rmem_tensor(shape, Float32) for _ in range(self.t.blocks)]
        for a in acc:
            a.fill(0.0)
        fragment = thr.partition_shape_A((64, self.hook.step))
        rA = [cute.make_rmem_tensor(fragment, self.operand) for _ in range(self.sets)]
        # sums of the open group, and its scales: rows g and g + 8
        part, fresh, due = None, None, (Float32(0.0), Float32(0.0))
        if const_expr(self.hook.group > 0):
            part = cute.make_rmem_tensor(shape, Float32)
            part.fill(0.0)
            fresh = cute.make_tiled_mma(cute.make_mma_atom(self.instruction(rows)))
            fresh.set(warpgroup.Field.ACCUMULATE, False)
        first = tid // 128 * self.t.blocks
        mmas, regs = (mma, fresh), (acc, part, rA, rB, self.places(shared, first))
        stage = done % self.stages
        phase = (done // self.stages) & 1
        before = Int32(self.stages)
        for _ in range(units // STAGE_UNITS):
            due = self.stage(mmas, regs, due, shared, full, empty, (stage, phase, before), 2)
            before = stage
            stage, phase = advance(stage, phase, self.stages)
        if units % STAGE_UNITS > 0:
            due = self.stage(mmas, regs, due, shared, full, empty, (stage, phase, before), 1)
            before = stage
            # in flight beyond the branch, they would have registers of their own in every width
            warpgroup.wait_group(0)
        warpgroup.wait_group(0)
        self.release(empty, before)
        if const_expr(self.hook.group > 0):
            self.close(acc[self.t.blocks - 1], part, due)
        self.epilogue.store(acc, extras, slots, mO, params, where, first, self.hook.power)

    def instruction(self, rows):
        """wgmma of 64 weight rows and that many tokens."""
        shape, source = (64, rows, self.mma_k), warpgroup.OperandSource.RMEM
        major = OperandMajorMode.K
        if self.operand is Float8E4M3FN:
            fp8 = Float8E4M3FN
            return warpgroup.MmaF8Op(fp8, fp8, Float32, shape, source, major, major)
        return warpgroup.MmaF16BF16Op(self.operand, Float32, shape, source, major, major)

    def tokens(self, shared, rows):
        """The stages of tokens as a B operand [rows, 128, stages]; a tile has its first rows."""
        m = self.t.block_m
        # columns of a row of 128 bytes, and values of a stage
        wide, size = 128 // self.width, STAGE_COLUMNS * m
        layout = cute.make_layout(
            ((8, rows // 8), (wide, self.width), self.stages),
            stride=((wide, 8 * wide), (1, wide * m), size),
        )
        ptr = cute.recast_ptr(shared.x.data_ptr(), cute.make_swizzle(3, 4, 3), dtype=self.operand)
        return cute.make_tensor(ptr, layout)

    @cute.jit
    def release(self, empty, stage):
        """This warp has read the stage."""
        if cute.arch.lane_idx() == 0:
            cute.arch.mbarrier_arrive(empty + stage)

    def stage(self, mmas, regs, due, shared, full, empty, at, units):
        """One stage of `units` units; the last wgmma are left in flight. The scales due."""
        if self.hook.group > 0:
            return self.stage_of_groups(mmas, regs, due, shared, full, empty, at, units)
        self.stage_of_values(mmas, regs, shared, full, empty, at, units)
        return due

    @cute.jit
    def stage_of_values(self, mmas, regs, shared, full, empty, at, units):
        """Weights are scaled: all sums go to the accumulators."""
        acc, _, rA, rB, places = regs
        stage, phase, before = at
        cute.arch.mbarrier_wait(full + stage, phase)
        step, steps = 0, COLUMNS // self.hook.step
        parts = [(u, b) for u in range(units) for b in range(self.t.blocks)]
        last = len(parts) * steps - 1
        ahead = [self.load(places, stage, b, u) for u, b in parts if self.ahead]
        for part in range_constexpr(len(parts)):
            u, b = parts[part]
            if const_expr(self.ahead):
                codes, words = ahead[part]
            else:
                codes, words = self.load(places, stage, b, u)
            operands = self.hook.operands(words)
            for c in range_constexpr(steps):
                a = rA[step % self.sets]
                self.decode(codes, operands, c, a)
                # then the next decode, or two, find their fragments free
                waits = step % self.sets in (0, self.sets - 1) or step == last
                self.issue(mmas[0], mmas[0], acc[b], a, rB, u * steps + c, stage, waits)
                if const_expr(step == 0):
                    self.release(empty, before)
                step += 1

    @cute.jit
    def stage_of_groups(self, mmas, regs, due, shared, full, empty, at, units):
        """Sums of groups: each is closed when the first step of the next is decoded."""
        acc, part, rA, rB, places = regs
        stage, phase, before = at
        cute.arch.mbarrier_wait(full + stage, phase)
        mma, fresh = mmas
        step, steps = 0, COLUMNS // self.hook.step
        parts = [(b, u) for b in range(self.t.blocks) for u in range(units)]
        ahead = [self.load(places, stage, b, u) for b, u in parts if self.ahead]
        for b in range_constexpr(self.t.blocks):
            for u in range_constexpr(units):
                if const_expr(self.ahead):
                    codes, words = ahead[b * units + u]
                else:
                    codes, words = self.load(places, stage, b, u)
                operands = self.hook.operands(words)
                for c in range_constexpr(steps):
                    self.decode(codes, operands, c, rA[step % 2])
                    begins = (u * COLUMNS + c * self.hook.step) % self.hook.group == 0
                    if const_expr(begins):
                        warpgroup.wait_group(0)
                        if const_expr(step == 0):
                            self.release(empty, before)
                        # the first group of a block follows the last of the block before
                        self.close(acc[b - int(u + c == 0)], part, due)
                        due = self.hook.scales(words)[c * self.hook.step // self.hook.group]
                    opening = (mma, fresh)[int(begins)]
                    self.issue(opening, mma, part, rA[step % 2], rB, u * steps + c, stage)
                    step += 1
        return due

    def close(self, acc, part, due):
        """acc += part times the scale of its row, g or g + 8."""
        for i in range(cute.size(acc)):
            acc[i] = acc[i] + part[i] * due[i // 2 % 2]

    def issue(self, opening, mma, acc, rA, rB, at, stage, waits=True):
        """The wgmma of step `at` of the stage; `waits` for those of all steps before."""
        warpgroup.fence()
        each = self.hook.step // self.mma_k
        for kk in range(each):
            cute.gemm(
                opening if kk == 0 else mma, acc, rA[None, None, kk],
                rB[None, None, each * at + kk, stage], acc,
            )  # fmt: skip
        warpgroup.commit_group()
        if waits:
            warpgroup.wait_group(1)

    @cute.jit
    def places(self, shared, first):
        """Where this lane finds, in stage 0 and from block `first` of the CTA, its code words and
        the scale words of its rows g and g + 8."""
        tid = cute.arch.thread_idx()[0] % 128
        warp, lane = tid // 32, tid % 32
        start = shared.w.data_ptr().toint() + first * (STAGE_UNITS * self.c.recipe.unit)
        scales = start + CODE_BYTES
        if const_expr(self.shared_scales):
            # two warps' in each unit
            scales += warp // 2 * self.c.recipe.unit + (warp % 2 * 8 + lane // 4) * 4
        else:
            scales += (warp * 8 + lane // 4) * 4 * self.hook.words
        # one multiply-add a stage each: what they have in common would be three instructions
        return opaque(start + tid * 16), opaque(scales)

    @cute.jit
    def load(self, places, stage, block, u):
        """Code words and scale words of a unit."""
        unit = self.c.recipe.unit
        at = stage * self.w_bytes + block * (STAGE_UNITS * unit)
        codes = self.words(places[0] + at + u * unit, 4)
        if const_expr(not self.shared_scales):
            at += u * unit
        return codes, self.words(places[1] + at, self.hook.words)

    @cute.jit
    def decode(self, codes, operands, step, rA):
        """A fragments of a step of a unit, from the words of rows g and g + 8."""
        rU = cute.recast_tensor(rA, Uint32)
        halves = self.hook.step // 32
        for i in range_constexpr(halves):
            j = step * halves + i
            for h in range_constexpr(2):
                made = self.hook.decode(codes[2 * j + h], operands[j][h], h)
                for n in range_constexpr(len(made)):
                    rU[(2 * i * len(made)) + h + 2 * n] = made[n]

    def words(self, address, n):
        """n neighbouring words of shared memory, one load."""
        ptr = cute.make_ptr(Uint32, address, cute.AddressSpace.smem, assumed_align=4 * n)
        r = cute.make_rmem_tensor((n,), Uint32)
        cute.autovec_copy(cute.make_tensor(ptr, cute.make_layout(n)), r)
        return [r[i] for i in range(n)]
