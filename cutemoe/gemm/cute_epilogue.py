"""What becomes of the sums of the Hopper GEMM: multipliers, bias, activation, rows of the output.

A lane 4 g + t of warp w holds, of a block of 64 packed rows and a tile of tokens, rows 16 w + g and
16 w + g + 8 of tokens 8 i + 2 t and 8 i + 2 t + 1. In gated layers the two rows are gate and up of
one output (layouts/sm90_rs_w4.py).
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from cutemoe.gemm.cute_async import store_pair, tile_start
from cutemoe.gemm.cute_plan import Config
from cutemoe.layouts.sm90_tokens import COLUMNS

# bytes of 8 rows of a unit of layout sm90_tokens
_EIGHT = 8 * COLUMNS * 2


class Epilogue:
    """Stores for one Config."""

    def __init__(self, c: Config):
        self.c = c
        self.dtype = {"bf16": BFloat16, "fp16": Float16, "fp32": Float32}[c.out]

    @cute.jit
    def store(self, acc, extras, slots, mO, params, where, block, power):
        """acc: sums [64 rows, tokens] of each block of this warpgroup, `block` its first in the
        CTA; where: expert, first sorted row, tokens, block of the CTA.

        Outputs of tokens that a tile lacks are computed too: only their stores are predicated, so
        that no branch keeps the outputs of a lane apart.
        """
        factor, x_scale, bias, top_k = extras
        expert, first, n, cta, _ = where
        tid = cute.arch.thread_idx()[0] % 128
        warp, g, t = tid // 32, tid % 32 // 4, tid % 4
        multiplier = Float32(power)
        if const_expr(self.c.factor):
            multiplier = multiplier * factor[expert]
        if const_expr(self.c.x_scale == "expert"):
            multiplier = multiplier * x_scale[expert]
        numbers = self.parameters(params, expert)
        packed = (cta * self.c.tile.row_blocks + block) * 64 + warp * 16 + g
        added = [self.bias(bias, expert, packed + 64 * b, mO) for b in range(len(acc))]
        # a lane's outputs in a row: column, and what is added for the others of it
        column, apart, width = packed, [[64 * b, 64 * b + 8] for b in range(len(acc))], mO.shape[1]
        if const_expr(self.c.gated):
            column, apart = self.output(packed), [[32 * b] for b in range(len(acc))]
        size = self.dtype.width // 8
        start = mO.iterator.toint() + Int64(column) * size
        stride = Int64(mO.stride[0]) * size
        # by block, output of a row and token of the lane
        tiles = self.packed(mO, where, column, t, apart) if self.c.packed_out else []
        # tokens from the first of this lane; none for outputs beyond the last
        left = [[n - 2 * t if column + a < width else Int32(0) for a in of] for of in apart]
        pairs = cute.size(acc[0]) // 4
        rows, scales = self.tokens(slots, x_scale, top_k, first + 2 * t, first + n - 1, pairs)
        for i in range_constexpr(pairs):
            if const_expr(not self.c.packed_out):
                at = [start + Int64(r) * stride for r in rows[i]]
            factors = [multiplier, multiplier]
            if const_expr(self.c.x_scale == "row"):
                factors = [multiplier * s for s in scales[i]]
            for b in range_constexpr(len(acc)):
                made = [
                    self.outputs([acc[b][c + 2 * h + 4 * i] * factors[c] for h in range(2)],
                                 added[b], numbers)
                    for c in range(2)
                ]  # fmt: skip
                for h in range_constexpr(len(apart[b])):
                    pair = [made[0][h], made[1][h]]
                    if const_expr(self.c.packed_out):
                        store_pair(self.c.out, tiles[b][h], _EIGHT * i, pair, left[b][h], 8 * i)
                    else:
                        store_pair(self.c.out, at, apart[b][h] * size, pair, left[b][h], 8 * i)

    def tokens(self, slots, x_scale, top_k, first, last, pairs):
        """Rows of the output and, where rows of x have scales, scales, of every pair of tokens.

        All are loaded before the first store: a store is a barrier for the loads behind it, so that
        a lane would wait for memory in each of them. H200, 2026-11-30, 4096 tokens of h4096 i2048
        e256 k6, part of the time of math: 16 % in FC2, with fp8 15 and 19 % (Nsight Compute).
        """
        rows = [[first + 8 * i + c for c in range(2)] for i in range(pairs)]
        scales = []
        if self.c.scatter or self.c.x_scale == "row":
            rows = [[cutlass.min(r, last) for r in pair] for pair in rows]
        if self.c.x_scale == "row":
            sources = rows
            if self.c.gather:
                sources = [[Uint32(slots[r]) // Uint32(top_k) for r in p] for p in rows]
            scales = [[x_scale[r] for r in pair] for pair in sources]
        if self.c.scatter:
            rows = [[slots[r] for r in pair] for pair in rows]
        return rows, scales

    def packed(self, mO, where, column, t, apart):
        """Addresses of the first two tokens of a lane, 2 t and 2 t + 1 of 8 rows, in a tile of
        layout sm90_tokens."""
        expert, first, n, _, tile = where
        units, eights = mO.shape[1] // COLUMNS, cute.ceil_div(n, 8)
        start = tile_start(mO.iterator.toint(), first, expert, tile, units * _EIGHT)

        def at(j, row):
            unit, piece = j // COLUMNS, j // 8 % 8
            return start + (unit * eights * _EIGHT + row * 128 + (piece ^ row) * 16 + j % 8 * 2)

        return [[[at(column + a, 2 * t + c) for c in range(2)] for a in of] for of in apart]

    @cute.jit
    def outputs(self, sums, added, numbers):
        """One token: the two rows of a lane, or the output that they make."""
        if const_expr(self.c.bias):
            sums = [s + a for s, a in zip(sums, added, strict=True)]
        if const_expr(self.c.gated):
            return [self.joined(sums[0], sums[1], numbers)]
        if const_expr(self.c.activation == "relu2"):
            sums = [Float32(0.0) if x < 0.0 else x for x in sums]
            sums = [x * x for x in sums]
        return sums

    def output(self, packed):
        """Output of the gate at this packed row."""
        return packed // 16 * 8 + packed % 8

    @cute.jit
    def bias(self, bias, expert, packed, mO):
        """Bias of the two rows of a lane; 0 beyond the last."""
        out = [Float32(0.0), Float32(0.0)]
        width = mO.shape[1]
        if const_expr(self.c.bias):
            if const_expr(self.c.gated):
                j = self.output(packed)
                at = {
                    "gate_up": (j, j + width),
                    "up_gate": (j + width, j),
                    "interleaved": (2 * j, 2 * j + 1),
                }[self.c.order]
                inside = (j < width, j < width)
            else:
                at = (packed, packed + 8)
                inside = (packed < width, packed + 8 < width)
            for h in range_constexpr(2):
                if inside[h]:
                    out[h] = bias[Int64(expert), at[h]]
        return out

    def parameters(self, params, expert):
        """alpha, beta and limit of this expert."""
        pairs = zip(params, self.c.params, strict=True)
        return [p[expert] if tensor else p for p, tensor in pairs]

    @cute.jit
    def joined(self, gate, up, numbers):
        """The activation of gate times up."""
        alpha, beta, limit = numbers
        if const_expr(self.c.activation == "swiglu"):
            if const_expr(self.c.limit):
                # comparisons, not minimum: NaN must stay NaN
                gate = limit if gate > limit else gate
                up = limit if up > limit else up
                up = -limit if up < -limit else up
            return gate * self.sigmoid(alpha * gate) * (up + beta)
        return self.gelu(gate) * up

    @cute.jit
    def gelu(self, x):
        """torch's gelu, with tanh or erf."""
        if const_expr(self.c.activation == "geglu_tanh"):
            # (1 + tanh(u)) / 2 = sigmoid(2 u), without cancellation
            u = Float32(0.7978845608028654) * (x + Float32(0.044715) * (x * x * x))
            return x * self.sigmoid(Float32(2.0) * u)
        erf = cute.math.erf(x * Float32(0.7071067811865476))  # pyright: ignore
        return Float32(0.5) * x * (Float32(1.0) + erf)

    def sigmoid(self, x):
        """1 / (1 + exp(-x)) from two approximate instructions, 2^-22; 0, 1/2 and 1 are exact."""
        e = cute.arch.exp2(x * Float32(-1.4426950408889634))
        return cute.arch.rcp_approx(Float32(1.0) + e)

    @cute.jit
    def zeros(self, mO, first, n, block):
        """Zero rows of the output, the columns of this CTA."""
        tid = cute.arch.thread_idx()[0] - 128
        start, width = block * 64, mO.shape[1]
        end = start + 64 * self.c.tile.row_blocks
        end = end if end < width else width
        for r in range(n):
            gO = mO[Int64(first + r), None]
            for j in range(start + tid, end, 128 * self.c.tile.warpgroups):
                gO[j] = self.dtype(0.0)
