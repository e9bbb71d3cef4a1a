# pyright: reportAttributeAccessIssue=false
"""FC2 of a NVFP4 layer: GEMM and bias; float32 rows in slot order, without routing weight."""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr, range_constexpr

from cutemoe.moe.cute_nvfp4_gemm import ExpertGemm


class FC2(ExpertGemm):
    """The kernel for one GemmConfig."""

    @cute.jit
    def __call__(
        self,
        operands: tuple,
        tiles: tuple,
        multipliers: tuple,
        mBias,
        mY: cute.Tensor,
        programs: Int32,
        stream: cuda.CUstream,
    ):
        """See `kernel`; `programs` is at least the live tiles times the blocks of outputs."""
        self.kernel(operands, tiles, multipliers, mBias, mY).launch(  # pyright: ignore
            grid=[programs, 1, 1], block=[self.t.threads, 1, 1], min_blocks_per_mp=1, stream=stream
        )

    @cute.kernel
    def kernel(self, operands, tiles, multipliers, mBias, mY):
        """y [R, H] = mid w2^T + b2; arguments as in FC1, operands with mid and w2."""
        program, _, _ = cute.arch.block_idx()
        if program < self.programs(operands, tiles):
            self.body(operands, tiles, multipliers, mBias, mY, program, self.stages())

    @cute.jit
    def body(self, operands, tiles, multipliers, mBias, mY, program, base):
        """One tile of rows and block of outputs; base: address of shared memory."""
        work = self.work(operands, tiles, program)
        acc = self.sums()
        self.multiply(operands, work, base, acc)
        self.finish(acc, work, tiles[2], multipliers, mBias, mY)

    @cute.jit
    def finish(self, acc, work, mSlots, multipliers, mBias, mY):
        """Bias and store, two neighbouring outputs of a row at a time."""
        m = self.multiplier(multipliers[0], multipliers[1], work.expert)
        row, n0, t = self.position()
        H = mY.shape[1]
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
                                rY[e] = acc[i][j][2 * h + e] * m
                                if const_expr(self.c.bias):
                                    rY[e] = rY[e] + mBias[work.expert, n + e]
                            cute.autovec_copy(rY, cute.local_tile(gY, (2,), (n // 2,)))
