# pyright: reportAttributeAccessIssue=false
"""The ends of an FP4 layer: rows of x to codes in sorted order, and slots of y to tokens."""

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8, Uint32, const_expr, range_constexpr

from cutemoe.dsl.codec import Codec, absolute_bits, reciprocal
from cutemoe.dsl.pdl import results_of_the_last_kernel
from cutemoe.moe.cute_nvfp4_left import DTYPES
from cutemoe.moe.cute_nvfp4_plan import RowsConfig, has_pdl


class Ids:
    """Expert ids [T, K] by slot number, for a configuration with `flat`."""

    def __init__(self, flat: bool):
        self.flat = flat

    def at(self, mIds, slot):
        """The id of a slot."""
        if self.flat:
            return mIds.iterator[slot]
        top_k = mIds.shape[1]
        return mIds[slot // top_k, slot % top_k]


class Quantise:
    """The kernel for one RowsConfig: one CTA a sorted row, a thread a block of 16 or 32."""

    def __init__(self, c: RowsConfig, threads: int = 128):
        self.threads = threads
        self.codec, self.ids, self.dtype = Codec(c.arch), Ids(c.flat), DTYPES[c.dtype]
        self.group = c.group
        self.pdl = has_pdl(c.arch)

    @cute.jit
    def __call__(
        self,
        mX: cute.Tensor,
        mIds: cute.Tensor,
        mSlots: cute.Tensor,
        mStart: cute.Tensor,
        mScale: cute.Tensor,
        mQ: cute.Tensor,
        mS: cute.Tensor,
        offset: Int32,
        stream: cuda.CUstream,
    ):
        """x [T, H], ids [T, K], sorted slots [R], starts [E + 1], multipliers [E] or None (mxfp4)
        -> codes as words [R, H/8] and scales, whole words of them, [R, ..] of the sorted rows."""
        self.kernel(mX, mIds, mSlots, mStart, mScale, mQ, mS, offset).launch(  # pyright: ignore
            grid=[cute.size(mSlots), 1, 1],
            block=[self.threads, 1, 1],
            use_pdl=self.pdl,
            stream=stream,
        )

    @cute.kernel
    def kernel(self, mX, mIds, mSlots, mStart, mScale, mQ, mS, offset):
        row, _, _ = cute.arch.block_idx()
        results_of_the_last_kernel(self.pdl)
        if row < mStart[mStart.shape[0] - 1]:
            self.row(mX, mIds, mSlots, mScale, mQ, mS, offset, row)

    @cute.jit
    def row(self, mX, mIds, mSlots, mScale, mQ, mS, offset, row):
        """One live sorted row."""
        tid, _, _ = cute.arch.thread_idx()
        slot = mSlots[row]
        g = None
        if const_expr(mScale is not None):
            g = reciprocal(mScale[Int32(self.ids.at(mIds, slot)) - offset])
        gX, at = mX[slot // mIds.shape[1], None], Int64(row)
        for block in range(tid, mS.shape[1], self.threads):
            scale = Uint32(0)
            if block * self.group < mX.shape[1]:
                scale = self.block(gX, mQ[at, None], block, g)
            mS[at, block] = Uint8(scale)

    @cute.jit
    def block(self, gX, gQ, block, g):
        """Codes of the numbers of a block, stored; their scale byte, returned."""
        group, words = self.group, self.group // 8
        rX = cute.make_rmem_tensor((group,), self.dtype)
        cute.autovec_copy(cute.local_tile(gX, (group,), (block,)), rX)
        amax = Uint32(0)
        for i in range_constexpr(group):
            bits = absolute_bits(Float32(rX[i]))
            amax = bits if bits > amax else amax
        scale, r = self.codec.scale_of(self.group, amax, g)
        rQ = cute.make_rmem_tensor((words,), Int32)
        for i in range_constexpr(words):
            word = Uint32(0)
            for j in range_constexpr(4):
                low, high = Float32(rX[8 * i + 2 * j]), Float32(rX[8 * i + 2 * j + 1])
                word = word | (self.codec.byte_of_codes(low, high, r) << (8 * j))
            rQ[i] = Int32(word)
        cute.autovec_copy(rQ, cute.local_tile(gQ, (words,), (block,)))
        return scale


class Combine:
    """The weighted sum over the slots of every token: float32, slots in ascending order."""

    def __init__(self, c: RowsConfig, threads: int):
        self.threads = threads
        self.dtype = DTYPES[c.dtype]

    @cute.jit
    def columns(self, mY, call, numbers, first, width, share):
        """out columns first .. first + width - 1 of all tokens, four at a time.

        y [R, ..] has them from column 0 on; share: number of this CTA, and of how many.
        """
        tid, _, _ = cute.arch.thread_idx()
        mO = call[2]
        quads = width // 4
        for i in range(share[0] * self.threads + tid, mO.shape[0] * quads, share[1] * self.threads):
            self.quad(mY, call, numbers, i // quads, i % quads, first // 4 + i % quads)

    @cute.jit
    def quad(self, mY, call, numbers, t, of_y, of_o):
        """Four outputs of a token, with one rounding."""
        mIds, mW, mO = call
        offset, experts = numbers[0], numbers[1]
        top_k = mIds.shape[1]
        acc = cute.make_rmem_tensor((4,), Float32)
        acc.fill(0.0)
        rY = cute.make_rmem_tensor((4,), Float32)
        for k in range(top_k):
            expert = mIds[t, k]
            if expert >= offset and expert < offset + experts:
                weight = mW[t, k]
                gY = mY[Int64(t) * top_k + k, None]
                cute.autovec_copy(cute.local_tile(gY, (4,), (of_y,)), rY)
                for i in range_constexpr(4):
                    acc[i] = acc[i] + weight * rY[i]
        rO = cute.make_rmem_tensor((4,), self.dtype)
        for i in range_constexpr(4):
            rO[i] = self.dtype(acc[i])
        cute.autovec_copy(rO, cute.local_tile(mO[t, None], (4,), (of_o,)))
