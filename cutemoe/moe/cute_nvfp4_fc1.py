# pyright: reportAttributeAccessIssue=false
"""FC1 of an FP4 layer: GEMM, bias, activation, and the result as codes of the same format.

Activation and quantisation happen on the float32 sums, in registers: a quad of lanes holds whole
blocks of 16 outputs, so the greatest of a block is two shuffles away. Of mxfp4, whose scales are
for 32, the other block is in the same warp, or, where a warp has 32 rows of gates and ups, in the
next one: then the greatest go through the shared memory that the stages have left. Where FC2 takes
numbers, the result is rounded once and stored as such.
"""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32, const_expr, range_constexpr

from cutemoe.dsl.codec import Codec, absolute_bits, reciprocal
from cutemoe.dsl.copy import put_word, shared_word
from cutemoe.dsl.pdl import results_of_the_last_kernel
from cutemoe.moe.cute_nvfp4_gemm import ExpertGemm
from cutemoe.moe.cute_nvfp4_left import least
from cutemoe.moe.cute_nvfp4_plan import GemmConfig


class FC1(ExpertGemm):
    """The kernel for one GemmConfig."""

    def __init__(self, c: GemmConfig):
        super().__init__(c)
        self.codec = Codec(c.arch)
        # 16 outputs: two pairs of gate and up, or two of 8 rows of w
        self.per_block = 4 if c.gated else 2
        self.group, self.pair = c.tile.group, c.tile.group // 16

    @cute.jit
    def __call__(
        self,
        operands: tuple,
        tiles: tuple,
        multipliers: tuple | None,
        mBias,
        params: tuple,
        result: tuple,
        programs: Int32,
        stream: cuda.CUstream,
    ):
        """See `kernel`; `programs` is at least the live tiles times the blocks of outputs."""
        self.kernel(operands, tiles, multipliers, mBias, params, result).launch(  # pyright: ignore
            grid=[programs, 1, 1],
            block=[self.t.threads, 1, 1],
            min_blocks_per_mp=1,
            use_pdl=self.pdl,
            stream=stream,
        )

    @cute.kernel
    def kernel(self, operands, tiles, multipliers, mBias, params, result):
        """mid = codes of activation(x w13^T + b13).

        operands: xq [R, H/2], its scale words [R, ..], w13 [E, N, H/2], its swizzled scale words;
        of numbers x [T, H] and K slots a token in place of the first two;
        tiles: (expert, first row, rows) [.., 3], count [1], sorted slots [R]; multipliers: of w13
        [E] or None, of x [E], of mid [E], or None (mxfp4); params: alpha, beta, limit; result:
        codes [R, I/2] and scales [R, ..], whole words of them, or numbers [R, I] alone.
        """
        program, _, _ = cute.arch.block_idx()
        results_of_the_last_kernel(self.pdl)
        if program < self.programs(operands, tiles):
            self.body(operands, tiles, multipliers, mBias, params, result, program, self.stages())

    def programs(self, operands, tiles):
        """Live tiles times blocks of outputs."""
        return tiles[1][0] * self.blocks(operands)

    @cute.jit
    def body(self, operands, tiles, multipliers, mBias, params, result, program, base):
        """One tile of rows and block of outputs, blocks of a tile side by side."""
        blocks = self.blocks(operands)
        work = self.work(tiles, program // blocks, program % blocks)
        acc = self.product(operands, work, base)
        n_out = self.n_out(operands)
        self.finish(acc, work, multipliers, mBias, params, result, n_out, base)

    @cute.jit
    def finish(self, acc, work, multipliers, mBias, params, result, n_out, base):
        """Bias, activation, quantisation, by blocks of 16 outputs of a row."""
        mFactor, mX, mMid = self.each(multipliers, 3)
        m = self.multiplier(mFactor, mX, work.expert)
        g = self.inverse(mMid, work.expert)
        row, n0, t = self.position()
        values = self.parameters(params, work.expert)
        found, greatest = [], []
        for q in range_constexpr(self.n_tiles // self.per_block):
            first = self.per_block * q
            j = work.j0 + (n0 + 8 * first) // (2 if const_expr(self.c.gated) else 1)
            bias = self.biases(mBias, work.expert, j, t, n_out)
            for i in range_constexpr(self.m_tiles):
                for h in range_constexpr(2):
                    x = []
                    for p in range_constexpr(2):
                        for e in range_constexpr(2):
                            n = 2 * h + e
                            if const_expr(self.c.gated):
                                gate = self.times(acc[i][first + 2 * p][n], m) + bias[2 * p + e]
                                up = self.times(acc[i][first + 2 * p + 1][n], m)
                                up = up + bias[4 + 2 * p + e]
                                x.append(self.gated(gate, up, values))
                            else:
                                y = self.times(acc[i][first + p][n], m) + bias[2 * p + e]
                                # a comparison keeps NaN
                                y = Float32(0.0) if y < 0.0 else y
                                x.append(y * y)
                    found.append((x, row + 16 * i + 8 * h, j // 16))
                    if const_expr(not self.c.numbers):
                        greatest.append(self.greatest(x))
        if const_expr(self.c.numbers):
            self.store_numbers(found, t, work, result[0], n_out)
        else:
            if const_expr(self.pair == 2):
                greatest = self.of_both(greatest, found, t, base)
            for i in range_constexpr(len(found)):
                x, r, block = found[i]
                self.store(x, greatest[i], g, r, block, t, work, result, n_out)

    @cute.jit
    def store_numbers(self, found, t, work, mMid, n_out):
        """Blocks of 16 outputs of a row, two neighbours at a time of the four in this lane."""
        dtype = self.left.dtype
        pair = cute.make_rmem_tensor((2,), dtype)
        for i in range_constexpr(len(found)):
            x, row, block = found[i]
            if row < work.rows and block * 16 < n_out:
                gMid = mMid[Int64(work.first + row), None]
                for p in range_constexpr(2):
                    for e in range_constexpr(2):
                        pair[e] = dtype(x[2 * p + e])
                    cute.autovec_copy(pair, cute.local_tile(gMid, (2,), (8 * block + 4 * p + t,)))

    @cute.jit
    def greatest(self, x):
        """Bits of the greatest |x| of a block of 16, four of them in each lane of a quad."""
        amax = absolute_bits(x[0])
        for i in range_constexpr(3):
            amax = greater(amax, absolute_bits(x[i + 1]))
        for s in range_constexpr(2):
            amax = greater(amax, cute.arch.shuffle_sync_bfly(amax, offset=1 << s))
        return amax

    @cute.jit
    def of_both(self, greatest, found, t, base):
        """The greatest of each block and of the one that has the same scale."""
        rows = 2 * self.m_tiles
        both = []
        if const_expr(len(greatest) > rows):
            for i in range_constexpr(len(greatest)):
                # rows of a block, then the next block
                other = i + rows if i // rows % 2 == 0 else i - rows
                both.append(greater(greatest[i], greatest[other]))
        else:
            # of a CTA's 64 outputs four blocks, their rows side by side
            cute.arch.sync_threads()
            for i in range_constexpr(rows):
                _, r, block = found[i]
                if t == 0:
                    put_word(base + (block % 4 * self.t.block_m + r) * 4, greatest[i])
            cute.arch.sync_threads()
            for i in range_constexpr(rows):
                _, r, block = found[i]
                other = shared_word(base + ((block ^ 1) % 4 * self.t.block_m + r) * 4)
                both.append(greater(greatest[i], other))
        return both

    def inverse(self, mScale, expert):
        """1 / the multiplier of an expert, or None where there is none."""
        return None if mScale is None else reciprocal(mScale[expert])

    def parameters(self, params, expert):
        """alpha, beta and limit of the expert."""
        c = self.c
        each = zip(params, (c.alpha_e, c.beta_e, c.limit_e))
        return [p[expert] if per_expert else p for p, per_expert in each]

    @cute.jit
    def biases(self, mBias, expert, j, t, n_out):
        """Of this thread's four outputs of a block, then of their up rows; zeros where none."""
        found = []
        for up in range_constexpr(2 if self.c.gated else 1):
            for p in range_constexpr(2):
                for e in range_constexpr(2):
                    if const_expr(self.c.bias):
                        n = least(j + 8 * p + 2 * t + e, n_out - 1)
                        if const_expr(self.c.gated):
                            n = self.row_of(n, up, 2 * n_out)
                        found.append(mBias[expert, n])
                    else:
                        found.append(Float32(0.0))
        return found

    @cute.jit
    def gated(self, gate, up, values):
        """The activation of a gate and an up sum."""
        alpha, beta, limit = values
        if const_expr(self.c.activation == "swiglu"):
            if const_expr(self.c.limit):
                # comparisons keep NaN
                gate = limit if gate > limit else gate
                up = limit if up > limit else up
                up = -limit if up < -limit else up
            y = gate * sigmoid(alpha * gate) * (up + beta)
        elif const_expr(self.c.activation == "geglu_tanh"):
            # (1 + tanh u) / 2 = sigmoid(2 u), without cancellation
            u = 0.7978845608028654 * (gate + 0.044715 * (gate * gate * gate))
            y = gate * sigmoid(2.0 * u) * up
        else:
            y = 0.5 * gate * (1.0 + cute.math.erf(gate * 0.7071067811865476)) * up
        return y

    @cute.jit
    def store(self, x, amax, g, row, block, t, work, result, n_out):
        """Quantises a block of 16 outputs of a row, four of them in each lane of a quad."""
        mQ, mS = result
        scale, r = self.codec.scale_of(self.group, amax, g)
        words = []
        for p in range_constexpr(2):
            word = self.codec.byte_of_codes(x[2 * p], x[2 * p + 1], r) << (8 * t)
            for s in range_constexpr(2):
                word = word | cute.arch.shuffle_sync_bfly(word, offset=1 << s)
            words.append(word)
        if row < work.rows:
            at = Int64(work.first + row)
            if block * 16 < n_out:
                if t < 2:
                    mQ[at, 2 * block + t] = Int32(words[0] if t == 0 else words[1])
            else:
                # what rounds a row up to whole scale words
                scale = Uint32(0)
            of, groups = block // self.pair, self.c.outputs // self.group
            if t == 2 and block % self.pair == 0 and of < mS.shape[1]:
                mS[at, of] = Uint8(scale)
            if const_expr(groups < 4):
                # 64 outputs have half a word; the other half may be nobody's
                of = of + groups
                if t == 3 and block % 2 == 0 and of < mS.shape[1] and of * self.group >= n_out:
                    mS[at, of] = Uint8(0)


@cute.jit
def greater(x, y):
    """The greater of two numbers."""
    return x if x > y else y


@cute.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + cute.math.exp(-x))
