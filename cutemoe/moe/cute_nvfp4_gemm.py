# pyright: reportAttributeAccessIssue=false
"""The GEMM of both layers: block_m routed rows of one expert times 128 rows of its weights.

Rows are in sorted order. Weights are codes with one word of four scales for 64 (nvfp4) or 128 of
them (mxfp4); the routed rows are codes too, or numbers (`cute_nvfp4_left`).

Threads   4 or 8 warps, warps_m along the rows, warps_n along the 128 rows of w; no roles
Pipe      cp.async, `stages` deep, one commit a stage and thread, one barrier a stage
Per k     wait for stage k | barrier | start the loads of stage k + stages - 1 | multiply stage k
Stage     rows of A [block_m] and codes of B [128], whose 16-byte chunks are permuted so that no
          bank is met twice; scale words, rows fastest
Registers the launches ask for one CTA a multiprocessor: without, ptxas keeps to 128 and spills
Sums      float32, k ascending in steps of 64: the same bits for every tile, stage and batch

Rows past the tile's and codes past K are zeros in shared memory and are not read. Rows of w past
the last read the last one; their sums go nowhere. Rejected: TMA, which needs padded K and a
descriptor for each layer, and warp roles, which leave fewer registers to the emulated MMA.
"""

from typing import Any

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr, range_constexpr

from cutemoe.dsl.copy import copy_async, matrices, shared_word
from cutemoe.dsl.memory import SmemAllocator
from cutemoe.dsl.mma import mixed_mma, mxfp4_mma, nvfp4_mma
from cutemoe.errors import Unsupported
from cutemoe.moe.cute_nvfp4_left import Codes, Numbers, least, place
from cutemoe.moe.cute_nvfp4_plan import BLOCK_N, GROUP, SMEM_LIMIT, GemmConfig, has_pdl


class Work:
    """The tile of this CTA: expert, first sorted row, rows, first output, slots of sorted rows."""

    def __init__(self, expert, first, rows, j0, slots):
        self.expert, self.first, self.rows, self.j0, self.slots = expert, first, rows, j0, slots


class Source:
    """Where this thread's share of a stage comes from and goes to."""


class ExpertGemm:
    """What FC1 and FC2 share, for one GemmConfig."""

    def __init__(self, c: GemmConfig):
        t = c.tile
        if t.smem_bytes > SMEM_LIMIT:
            raise Unsupported(
                f"tile {t}: {t.smem_bytes} bytes of shared memory, at most {SMEM_LIMIT}"
            )
        self.c, self.t = c, t
        self.pdl = has_pdl(c.arch)
        self.policy: Any
        self.left: Any
        if c.numbers:
            self.policy, self.left = mixed_mma(c.arch, c.numbers), Numbers(c)
        else:
            self.policy = nvfp4_mma(c.arch) if c.scaled else mxfp4_mma(c.arch)
            self.left = Codes(c)
        self.pitch = t.block_k // 2
        self.steps, self.words = t.block_k // 64, t.words
        self.warp_m, self.warp_n = t.block_m // t.warps_m, BLOCK_N // t.warps_n
        self.m_tiles, self.n_tiles = self.warp_m // 16, self.warp_n // 8
        self.chunks = self.pitch // c.vector
        self.pass_rows = t.threads // self.chunks
        self.b_at = t.block_m * t.row_bytes
        self.sa_at = self.b_at + BLOCK_N * self.pitch
        self.sb_at = self.sa_at + (0 if t.numbers else 4 * t.block_m * self.words)

    def weight_row(self, r, j0, N):
        """Row of w behind row r of B, at most the last.

        Gated: rows 16 q .. 16 q + 7 are gates, 16 q + 8 .. their ups, so that one thread owns both.
        """
        if not self.c.gated:
            return least(j0 + r, N - 1)
        j = least(j0 + (r // 16) * 8 + r % 8, N // 2 - 1)
        return self.row_of(j, (r // 8) % 2, N)

    def row_of(self, j, up, N):
        """Row of w that is the gate (up = 0) or the up row of output j."""
        if self.c.order == "interleaved":
            return 2 * j + up
        return j + (up if self.c.order == "gate_up" else 1 - up) * (N // 2)

    def stages(self):
        """Address of the shared memory of all stages."""
        return SmemAllocator().allocate(self.t.smem_bytes, byte_alignment=128).toint()

    def n_out(self, operands):
        """Outputs of a row."""
        N = operands[2].shape[1]
        return N // 2 if self.c.gated else N

    def blocks(self, operands):
        """Blocks of outputs of a row."""
        return cute.ceil_div(self.n_out(operands), self.c.outputs)

    def work(self, tiles, tile, block):
        """A tile of rows and a block of outputs."""
        mTiles, _, mSlots = tiles
        j0 = block * self.c.outputs
        return Work(mTiles[tile, 0], mTiles[tile, 1], mTiles[tile, 2], j0, mSlots)

    def product(self, operands, work, base):
        """The sums of this thread for a tile and a block; base: address of shared memory."""
        acc = self.sums()
        self.multiply(operands, work, base, acc)
        return acc

    # ---- memory to stages

    def source(self, operands, work):
        """This thread's rows of A and B and its scale words."""
        mA, mWith, mB, mSB = operands
        tid, _, _ = cute.arch.thread_idx()
        s, width = Source(), mB.shape[2]
        s.tid, s.width, s.words = tid, width, cute.ceil_div(width, 2 * self.t.group)
        s.row, s.byte = tid // self.chunks, tid % self.chunks * self.c.vector
        s.to = place(self.pitch, s.row, s.byte)
        N = mB.shape[1]
        s.b = mB.iterator.toint() + Int64(work.expert) * Int64(N) * width + s.byte
        passes = BLOCK_N // self.pass_rows
        s.b_rows = [
            self.weight_row(s.row + i * self.pass_rows, work.j0, N) * width for i in range(passes)
        ]
        r = self.weight_row(tid % BLOCK_N, work.j0, N)
        inner = r // 128 * s.words * 512 + r % 32 * 16 + r % 128 // 32 * 4
        s.sb = mSB.iterator.toint() + Int64(work.expert) * mSB.shape[1] * 4 + Int64(inner)
        self.left.source(s, mA, mWith, work)
        return s

    @cute.jit
    def load(self, s, k, stage):
        """Starts the copies of stage k, codes from k * block_k on."""
        self.left.load(s, k, stage)
        byte = k * self.pitch
        inside = s.byte + byte < s.width
        for i in range_constexpr(BLOCK_N // self.pass_rows):
            # passes keep the chunk's place: they are a multiple of 8 rows apart
            to = stage + self.b_at + s.to + i * self.pass_rows * self.pitch
            copy_async(to, s.b + Int64(s.b_rows[i] + byte), self.c.vector, inside)
        self.left.load_scales(s, k, stage + self.sa_at)
        threads = self.t.threads
        for i in range_constexpr(-(-BLOCK_N * self.words // threads)):
            one = s.tid // BLOCK_N + i * (threads // BLOCK_N)
            word = k * self.words + one
            if one < self.words:
                to = stage + self.sb_at + (one * BLOCK_N + s.tid % BLOCK_N) * 4
                copy_async(to, s.sb + Int64(word) * 512, 4, word < s.words)

    # ---- stages to sums

    def sums(self):
        """Zeroed sums of a warp, four numbers for each 16 rows and 8 rows of w."""
        acc = [
            [cute.make_rmem_tensor((4,), Float32) for _ in range(self.n_tiles)]
            for _ in range(self.m_tiles)
        ]
        for row in acc:
            for x in row:
                x.fill(0.0)
        return acc

    @cute.jit
    def multiply(self, operands, work, base, acc):
        """acc += A B over all of K."""
        s = self.source(operands, work)
        stages, size = const_expr(self.t.stages), const_expr(self.t.stage_bytes)
        n = cute.ceil_div(s.width, self.pitch)
        for k in range_constexpr(stages - 1):
            if k < n:
                self.load(s, Int32(k), base + k * size)
            cute.arch.cp_async_commit_group()
        read, write = base, base + (stages - 1) * size
        end = base + stages * size
        for k in range(n):
            cute.arch.cp_async_wait_group(stages - 2)
            cute.arch.sync_threads()
            if k + stages - 1 < n:
                self.load(s, k + stages - 1, write)
            cute.arch.cp_async_commit_group()
            self.step(read, acc)
            read = read + size if read + size < end else base
            write = write + size if write + size < end else base

    def step(self, stage, acc):
        """acc += A B of one stage."""
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 32)
        m0, n0 = warp % self.t.warps_m * self.warp_m, warp // self.t.warps_m * self.warp_n
        # matrices: 8 rows and 16 bytes each, bytes before rows
        b_row, b_byte = n0 + lane // 16 * 8 + lane % 8, lane // 8 % 2 * 16
        b_at = stage + self.b_at + place(self.pitch, b_row, b_byte)
        sb_at = stage + self.sb_at + (n0 + lane // 4) * 4
        rows = self.left.fragments(stage, stage + self.sa_at, m0, lane)
        nvfp4 = self.t.group == GROUP["nvfp4"]
        for k in range(self.steps):
            # mxfp4: a word has the scales of two steps
            word, *half = (k,) if nvfp4 else (k // 2, k % 2)
            a = []
            for i in range(self.m_tiles):
                a.append(self.policy.a(*self.left.fragment(rows, i, k, word), *half))
            for j in range(0, self.n_tiles, 2):
                words = matrices((b_at + j * 8 * self.pitch) ^ (32 * k))
                for h in range(2):
                    scales = shared_word(sb_at + (word * BLOCK_N + 8 * (j + h)) * 4)
                    b = self.policy.b(words[2 * h : 2 * h + 2], scales, *half)
                    for i in range(self.m_tiles):
                        self.policy.mma(acc[i][j + h], a[i], b)

    def position(self):
        """First row and first row of w of this thread's sums: its warp's, g and 2 t."""
        lane = cute.arch.lane_idx()
        warp = cute.arch.make_warp_uniform(cute.arch.thread_idx()[0] // 32)
        m0, n0 = warp % self.t.warps_m * self.warp_m, warp // self.t.warps_m * self.warp_n
        return m0 + lane // 4, n0, lane % 4

    def each(self, multipliers, n):
        """The n multipliers; the DSL takes no tuple of nothing but None."""
        return (None,) * n if multipliers is None else multipliers

    def multiplier(self, mFactor, mScale, expert):
        """What the sums of an expert still lack, of activations and of weights; None is nothing."""
        found = [x[expert] for x in (mScale, mFactor) if x is not None]
        return found[0] * found[1] if len(found) == 2 else (found or [None])[0]

    def times(self, x, m):
        """x * m, for a multiplier that may be None."""
        return x if m is None else x * m
