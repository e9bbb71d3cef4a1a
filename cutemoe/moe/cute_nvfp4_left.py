# pyright: reportAttributeAccessIssue=false
"""Operand A of the GEMM of an FP4 layer: routed rows as codes with scales, or as numbers.

| | codes | numbers |
|---|---|---|
| rows | sorted, one after the other | sorted, or gathered from x by their slots |
| stage | block_k / 2 bytes a row, and a word of four scales | 2 block_k bytes a row |
| to registers | ldmatrix | 16 bytes a lane: eight numbers from k = 8 t on |
"""

import cutlass.cute as cute
from cutlass import BFloat16, Float16, Int64, Uint32, const_expr, range_constexpr

from cutemoe.dsl.copy import copy_async, matrices, put_words, shared_word, shared_words
from cutemoe.moe.cute_nvfp4_plan import GemmConfig

DTYPES = {"bf16": BFloat16, "fp16": Float16}


def place(pitch, row, byte):
    """Byte of a stage's operand where a byte of a row's codes is; pitch: bytes of a row."""
    # of the rows that ldmatrix takes at once, those on the same banks differ in this
    key = row // (128 // pitch) % (pitch // 16)
    return row * pitch + ((byte // 16) ^ key) * 16 + byte % 16


class Codes:
    """Rows of codes, sorted, with their scale words."""

    def __init__(self, c: GemmConfig):
        self.t, self.vector = c.tile, c.vector
        self.pitch = c.tile.row_bytes
        self.pass_rows = c.tile.threads // (self.pitch // c.vector)

    def source(self, s, mA, mSA, work):
        """This thread's rows and scale words: codes [R, K / 2], scale words [R, ..]."""
        s.a = mA.iterator.toint() + Int64(work.first + s.row) * s.width + s.byte
        s.a_step = Int64(self.pass_rows) * s.width
        s.rows = work.rows
        s.sa_row = s.tid % self.t.block_m
        s.sa_words = mSA.shape[1]
        s.sa = mSA.iterator.toint() + Int64(work.first + s.sa_row) * (4 * s.sa_words)

    @cute.jit
    def load(self, s, k, stage):
        """Starts the copies of the codes of stage k."""
        byte = k * self.pitch
        inside = s.byte + byte < s.width
        for i in range_constexpr(self.t.block_m // self.pass_rows):
            live = inside and s.row + i * self.pass_rows < s.rows
            to = stage + s.to + i * self.pass_rows * self.pitch
            copy_async(to, s.a + i * s.a_step + byte, self.vector, live)

    @cute.jit
    def load_scales(self, s, k, at):
        """Starts the copies of the scale words of stage k to `at`."""
        threads, m, words = self.t.threads, self.t.block_m, self.t.words
        for i in range_constexpr(-(-m * words // threads)):
            one = s.tid // m + i * (threads // m)
            word = k * words + one
            if one < words:
                live = word < s.sa_words and s.sa_row < s.rows
                to = at + (one * m + s.sa_row) * 4
                copy_async(to, s.sa + Int64(word * 4), 4, live)

    def fragments(self, stage, scales_at, m0, lane):
        """Where this lane reads the rows of its warp."""
        # matrices: 8 rows and 16 bytes each, rows before bytes
        at = stage + place(self.pitch, m0 + lane % 16, lane // 16 * 16)
        return at, scales_at + (m0 + lane // 4 + lane % 2 * 8) * 4

    def fragment(self, where, i, k, word):
        """Four words and a scale word: 16 rows from 16 i on, 64 codes from 64 k on."""
        at, scales_at = where
        words = matrices((at + i * 16 * self.pitch) ^ (32 * k))
        return words, shared_word(scales_at + (word * self.t.block_m + 16 * i) * 4)


class Numbers:
    """Rows of numbers, sorted, or those of x by their slots."""

    def __init__(self, c: GemmConfig):
        self.t, self.wide, self.dtype = c.tile, c.wide, DTYPES[c.numbers]
        self.pitch = c.tile.row_bytes
        self.chunks = self.pitch // 16
        self.pass_rows = c.tile.threads // self.chunks
        self.passes = c.tile.block_m // self.pass_rows

    def source(self, s, mA, top_k, work):
        """This thread's rows of A [R, K], or of A [T, K] that top_k slots share."""
        s.mA, s.rows = mA, work.rows
        s.a_row, s.a_chunk = s.tid // self.chunks, s.tid % self.chunks
        s.a_to = s.a_row * self.pitch + (s.a_chunk ^ (s.a_row % 2 * 4)) * 16
        s.a_rows = []
        for i in range(self.passes):
            # rows past the last are not read
            row = work.first + least(s.a_row + i * self.pass_rows, work.rows - 1)
            row = row if top_k is None else work.slots[row] // top_k
            s.a_rows.append(Int64(row))

    @cute.jit
    def load(self, s, k, stage):
        """Starts the copies of the numbers of stage k, or copies them where rows are not wide."""
        first = k * self.t.block_k + s.a_chunk * 8
        inside = first < s.mA.shape[1]
        for i in range_constexpr(self.passes):
            live = inside and s.a_row + i * self.pass_rows < s.rows
            # passes keep the chunk's place: they are an even number of rows apart
            to = stage + s.a_to + i * self.pass_rows * self.pitch
            if const_expr(self.wide):
                row = s.mA[s.a_rows[i], None]
                copy_async(to, row.iterator.toint() + 2 * first, 16, live)
            else:
                self.copy(s.mA, s.a_rows[i], first, live, to)

    @cute.jit
    def copy(self, mA, row, first, live, to):
        """Eight numbers, one at a time; zeros where not live."""
        numbers = cute.make_rmem_tensor((8,), self.dtype)
        numbers.fill(0.0)
        if live:
            for i in range_constexpr(8):
                numbers[i] = mA[row, first + i]
        words = cute.recast_tensor(numbers, Uint32)
        put_words(to, [words[i] for i in range(4)])

    def load_scales(self, s, k, at):
        """Numbers have none."""

    def fragments(self, stage, scales_at, m0, lane):
        """Where this lane reads row g of its warp, k = 8 t on."""
        g, t = lane // 4, lane % 4
        return stage + (m0 + g) * self.pitch + (t ^ (g % 2 * 4)) * 16

    def fragment(self, at, i, k, word):
        """Rows g and g + 8 of 16, numbers from k = 64 k + 8 t on and 32 later."""
        at = at + i * 16 * self.pitch + 128 * k
        found = []
        for half in range(2):
            for row in range(2):
                found.append(shared_words((at + row * 8 * self.pitch) ^ (64 * half)))
        return (found,)


@cute.jit
def least(x, y):
    """The smaller of two numbers."""
    return x if x < y else y
