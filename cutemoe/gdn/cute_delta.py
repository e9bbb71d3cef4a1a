# pyright: reportAttributeAccessIssue=false
"""Gated delta net decode and draft verification as one CuTe DSL kernel of independent warps.

A warp owns 16 rows (values) of one head's state for all tokens: 16 x DK numbers in its registers,
read once. It uses no shared memory and no barrier; the warps of a CTA share only the launch.

Lanes     lane = 4 g + t. Of rows 2 g and 2 g + 1 of its tile a lane holds the columns
          (4 ch + t) vec + j: 16 contiguous bytes a chunk ch. The order of a contraction is free, so
          these registers are the B operand of mma.m16n8k8 as they come, one block of 8 rows for
          each parity, and the same columns of token g's k and q are the A operand.
Tokens    tile 8: k_0..k_7 in rows 0..7 of A, q_0..q_7 in rows 8..15. tile 4: k_0..k_3, q_0..q_3 in
          rows 0..7. A lane's results belong to token g and to rows 4 t .. 4 t + 3.
Per warp  1 loads: slot | q, k, v, gates of the window | state (and the mark of the open window)
          2 while the state is under way: Gram matrix k k^T, q k^T by mma, norms on its diagonal
          3 decays: products of g from token to token, a scan over the quad
          4 fold (verify): S <- D S + sum of the accepted u k^T; stored if there were any
          5 S k, S q of the whole window by mma; then u, token by token
          6 outputs, records; S advanced over the window where anybody needs it

Order     ptxas moves the loads of the state behind all of 2 and 3 where registers are short (0.8 us
          at B=1), and mixes 2 and 3 with 5 where they are not: behind the state, not beside it. It
          moves neither loads down past a branch nor shuffles into one. So the loads are in a
          branch, and 4 to 6 are in another.

Precision: 16-bit q and k are exact in TF32, so S k needs S = high + low only, two mma; float32 q
and k have their low parts in rows 8..15. An mma truncates its sums: with float32 q and k its chains
are short and added up outside, and a state is D S + x by FMA, where only x comes out of an mma.
Folding recorded u does what `gdn_decode` of the same tokens does, bit for bit.

A single token, and float32 states after every token, are cute_step.py's in layout "vk". In "kv" a
call without states between takes all its tokens in at once, one with them token by token, so the
last bits of the final state differ between the two; outputs do not.

Measured on an H200, 2026-12-01, HV=32, HQ=16, D=128, us at B = 16 / 64 / 256: verification of T=8
with nothing folded 14.6/43.4/161 in float32 and 10.2/27.6/99 in bfloat16, with everything folded
27.0/91.6/352 and 17.8/58.7/213. perf/notes/gdn.md has what was tried and why.

Rejected, in us at B=64: k, q and coefficients in shared memory, the Gram matrix split over the
warps, three barriers a tile (T=8, output only: 85); the state as A operand (a move for every
number); a rank-1 update a token by FMA from global or shared memory (verify, T=8, all folded: 115);
loads that evict first or do not allocate in L1 and stores that stream (T=1: 74.5 and 77.7);
dependent launch (-0.8, B=1: +0.3); warps that walk over the sequences and load one ahead into
shared memory by bulk copies (verify, T=8: 55 and 111); states a wave ahead fetched into L2 (47 to
60 and 102 to 122); a warp for two to eight tiles of a head (47 to 52 and 109 to 123).
Weights as exp of a difference of sums are NaN at g = 0.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int16, Int32, Int64, Uint32, const_expr, range_constexpr
from cutlass.cute.nvgpu.warp import MmaF16BF16Op

from cutemoe.gdn.cute_rows import Head, Lane, Rows

NORM_EPS = 1e-6


class Weights:
    """What the tokens of a tile do to any row of a state.

    Of the lane's token: log_g, its gate g, beta, the factors r of its k and q, the decays `later`
    and `before`, `own` factors of S k and S q, and rM, the `coefficients`.
    """

    def __init__(self, log_g, g, beta, r, later, before, own, rM):
        self.log_g, self.g, self.beta, self.r = log_g, g, beta, r
        self.later, self.before, self.own, self.rM = later, before, own, rM


class GatedDelta(Rows):
    """The kernel for one Config."""

    GROUP = 2

    @cute.jit
    def __call__(
        self,
        inputs: tuple,
        gates: tuple,
        mS: cute.Tensor,
        mIdx,
        mI,
        draft,
        mAcc,
        scale: Float32,
        group: Int32,
        magic: Int32,
        stream: cuda.CUstream,
    ):
        """inputs: q, k [B, T, HQ, DK], v, out [B, T, HV, DV]; draft: as in GDNDraft, or None.

        mI: states after tokens [B, steps, HV, ...], or with `targets` their slots [B, T].
        """
        B, _, HV, DV = inputs[3].shape
        self.kernel(inputs, gates, mS, mIdx, mI, draft, mAcc, scale, group, magic).launch(  # pyright: ignore
            grid=[cute.ceil_div(DV, self.c.rows * self.c.warps), HV, B],
            block=[32 * self.c.warps, 1, 1],
            min_blocks_per_mp=self.c.blocks,
            preferred_smem_carveout=0,
            stream=stream,
        )

    @cute.kernel
    def kernel(self, inputs, gates, mS, mIdx, mI, draft, mAcc, scale, group, magic):
        tile, hv, b = cute.arch.block_idx()
        tid, _, _ = cute.arch.thread_idx()
        warp = cute.arch.make_warp_uniform(tid // 32)
        first = (tile * self.c.warps + warp) * self.c.rows
        slot = Int64(b)
        if const_expr(self.c.index != ""):
            slot = Int64(mIdx[b])
        hq = (hv * magic) >> 16
        head = Head(b, hv, hq, slot, hv == hq * group, inputs[3].shape[1])
        if const_expr(self.verify):
            head.accepted = mAcc[b]
        if const_expr(self.c.ragged):
            if first < inputs[3].shape[3]:
                self.rows(inputs, gates, mS, mI, draft, scale, head, first)
        else:
            self.rows(inputs, gates, mS, mI, draft, scale, head, first)

    @cute.jit
    def rows(self, inputs, gates, mS, mI, draft, scale, head, first):
        """The rows of this warp."""
        at = Lane(first)
        window = self.registers()
        if const_expr(not self.c.loop):
            self.load_window(inputs, gates, window, head, at, 0)
        # the loads above it stay above the branch on the slot: one latency, not two
        cute.arch.sync_warp()
        live = head.slot >= 0 and head.slot < mS.shape[0]
        gS = self.narrow(mS[head.slot, head.hv, None, None], 2)
        rS = cute.make_rmem_tensor((self.vec, 2, self.chunks), self.held)
        mark = Int32(0)
        if live:
            if const_expr(self.verify):
                mark = Int32(draft[4][head.slot, head.hv, at.first])
            self.load_state(gS, rS, at)
        # neither do loads move down past this branch, nor shuffles into the next one
        w = None
        if const_expr(not self.c.loop):
            w = self.weights(window, scale, at, head.T)
        if live:
            self.sequence(inputs, gates, mS, gS, mI, draft, scale, window, w, rS, mark, head, at)
        else:
            self.padding(inputs[3], head, at)

    @cute.jit
    def padding(self, mO, head, at):
        """Zero rows of out."""
        rO = cute.make_rmem_tensor((4,), self.io)
        rO.fill(0.0)
        for t in range(at.g, mO.shape[1], 8):
            self.put_quad(mO[head.b, t, head.hv, None], rO, at)

    @cute.jit
    def sequence(self, inputs, gates, mS, gS, mI, draft, scale, window, w, rS, mark, head, at):
        """All tokens of one head of one live sequence."""
        half = Int32(0)
        if const_expr(self.verify):
            half, n = 1 - (mark & 1), mark >> 1
            n = Int32(head.accepted) if head.accepted < n else n
            if n > 0:
                self.fold(gS, rS, draft, n, 1 - half, head, at)
                if const_expr(self.again):
                    self.load_qkv(inputs, window, head, at, self.token(head, at, 0))
        if const_expr(self.c.loop):
            self.in_turn(inputs, gates, mS, gS, mI, draft, scale, window, rS, half, head, at)
        else:
            self.tokens(inputs, mS, gS, mI, draft, window, w, rS, half, head, at, 0)
        if const_expr(self.verify):
            if at.t == 0:
                new = Int16(2 * head.T + half)
                for h in range_constexpr(2):
                    if self.inside(at, h, inputs[3].shape[3]):
                        draft[4][head.slot, head.hv, at.row + h] = new

    @cute.jit
    def in_turn(self, inputs, gates, mS, gS, mI, draft, scale, window, rS, half, head, at):
        """A tile of tokens after the other."""
        for t0 in range(0, head.T, self.c.tile):
            self.load_window(inputs, gates, window, head, at, t0)
            w = self.weights(window, scale, at, head.T - t0)
            self.tokens(inputs, mS, gS, mI, draft, window, w, rS, half, head, at, t0)
        if const_expr(self.c.update):
            self.store_state(gS, rS, at)

    @cute.jit
    def tokens(self, inputs, mS, gS, mI, draft, window, w, rS, half, head, at, t0):
        """A tile of tokens from t0 on: outputs, records, states."""
        c = self.c
        mK, mO = inputs[1], inputs[3]
        rX, rV, _ = window
        n = head.T - t0
        rP = self.products(rS, rX)
        self.solve(rP, rV, w, at)
        self.put_out(mO, rP, head, at, t0)
        if const_expr(self.verify):
            self.record(draft, rX, rP, w, half, head, at, t0)
        gK = self.narrow(mK[head.b, None, head.hq, None], 0)
        steps = n if n < c.tile else Int32(c.tile)
        if const_expr(c.snapshots or c.targets != ""):
            rF = self.in_float32(rS)
            to = self.target(mI, mS.shape[0], head, at, t0) if const_expr(c.targets) else None
            for s in range(steps):
                x = self.from_lane(w.r[0], 4 * s)
                self.add(rF, gK, t0 + s, rP, s, x, self.from_lane(w.g, 4 * s), at)
                if const_expr(c.targets != ""):
                    slot = self.from_lane(to, 4 * s)
                    if slot >= 0:
                        gX = self.narrow(mS[Int64(slot), head.hv, None, None], 2)
                        self.store_state(gX, rF, at)
                else:
                    gX = self.narrow(mI[head.b, t0 + s, head.hv, None, None], 2)
                    self.store_state(gX, rF, at)
            if const_expr(c.update and not c.loop):
                self.store_state(gS, rF, at)
        elif const_expr(c.update):
            rF = self.in_float32(rS)
            share = self.share(w.later, w.before, w.r[0], c.tile, at)
            self.advance(rF, gK, t0, steps, rP, share, c.tile, at)
            if const_expr(not c.loop):
                self.store_state(gS, rF, at)
        elif const_expr(c.loop):
            if n > c.tile:
                share = self.share(w.later, w.before, w.r[0], c.tile, at)
                self.advance(rS, gK, t0, steps, rP, share, c.tile, at)

    # ---- the window: q, k, v and gates of a tile of tokens

    def registers(self):
        """Fragments of k and q, v of four rows, and the gates of the lane's token."""
        rX = [cute.make_rmem_tensor((self.vec, self.chunks), self.io) for _ in range(self.blocks)]
        rG = cute.make_rmem_tensor((len(self.c.gates),), Float32)
        return rX, cute.make_rmem_tensor((4,), self.io), rG

    @cute.jit
    def load_window(self, inputs, gates, window, head, at, t0):
        """The lane's token of a tile from t0 on."""
        t = self.token(head, at, t0)
        self.load_gates(gates, window[2], head.b, head.hv, t)
        self.load_qkv(inputs, window, head, at, t)

    def token(self, head, at, t0):
        """The lane's; past the last one the last one, whose results go nowhere."""
        return cutlass.min(t0 + at.g % self.c.tile, head.T - 1)

    @cute.jit
    def load_qkv(self, inputs, window, head, at, t):
        """Fragments of k and q of token t, four rows of its v."""
        rX, rV, _ = window
        gV = self.narrow(inputs[2][head.b, None, head.hv, None], 1)[t, None]
        self.get_quad(gV, rV, at)
        gK = self.narrow(inputs[1][head.b, None, head.hq, None], 0)[t, None]
        gQ = self.narrow(inputs[0][head.b, None, head.hq, None], 0)[t, None]
        if const_expr(self.c.tile == 8):
            self.load_row(gK, rX[0], at)
            self.load_row(gQ, rX[1], at)
        else:
            base = gK.iterator.toint() if at.g < 4 else gQ.iterator.toint()
            align = self.alignment(0, self.io)
            ptr = cute.make_ptr(self.io, base, cute.AddressSpace.gmem, assumed_align=align)
            self.load_row(cute.make_tensor(ptr, cute.make_layout((self.c.dk,))), rX[0], at)

    @cute.jit
    def load_gates(self, gates, rG, b, hv, t):
        for i in range_constexpr(2):
            rG[i] = Float32(self.narrow(gates[i][b, None, hv])[t])
        if const_expr(len(gates) == 4):
            rG[2] = Float32(gates[2][hv])
            rG[3] = Float32(gates[3][hv])

    @cute.jit
    def gate(self, rG):
        """log g and beta of the lane's token; log g is 0 where a factor of it is."""
        log_g, beta = rG[0], rG[1]
        if const_expr(len(self.c.gates) == 4):
            rate = cute.math.exp(rG[2])
            x = log_g + rG[3]
            soft = cute.math.log1p(cute.math.exp(x if x < 20.0 else Float32(20.0)))
            soft = x if x > 20.0 else soft
            log_g = Float32(0) if rate == 0.0 or soft == 0.0 else -rate * soft
            y = 1.0 + cute.math.exp(-beta)
            z = cute.arch.rcp_approx(y)
            beta = z * (2.0 - y * z) if z > 0.0 else z
        return log_g, beta

    @cute.jit
    def target(self, mI, slots, head, at, t0):
        """The slot for the state after the lane's token, -1 for none."""
        t = t0 + at.g % self.c.tile
        last = mI.shape[1] - 1
        to = Int64(mI[head.b, t if t < last else last])
        return Int32(to) if to >= 0 and to < slots else Int32(-1)

    # ---- small products of the window

    @cute.jit
    def weights(self, window, scale, at, n):
        """Of a tile of tokens, of which n are left: what does not depend on the state."""
        rX, _, rG = window
        log_g, beta = self.gate(rG)
        live = at.g % self.c.tile < n
        beta = beta if live else Float32(0)
        g = cute.math.exp(log_g) if live else Float32(1)
        rD = self.gram(rX)
        r = self.norms(rD, scale, at)
        r_k = [self.from_lane(r[0], 8 * at.t + 4 * j) for j in range(2)]
        later, before = self.decays(g, at.g % self.c.tile, at)
        factors = self.factors(r, beta, at)
        rM = self.coefficients(rD, factors, r_k, later)
        own = [f * before for f in factors]
        taken = beta if at.g < 4 or self.c.tile == 8 else Float32(0)
        return Weights(log_g, g, taken, r, later, before, own, rM)

    @cute.jit
    def gram(self, rX):
        """x_g . x_n for the lane's two n: [k k, q k, -, q q] (tile 8) or [x x] (tile 4)."""
        rD = self.sums(self.blocks)
        if const_expr(self.exact):
            atom = cute.make_mma_atom(MmaF16BF16Op(self.io, Float32, (16, 8, 16)))
            wX = [cute.recast_tensor(x, Uint32) for x in rX]
            for k in range_constexpr(self.c.dk // 16):
                rA = self.words_a(wX, k)
                for n in range_constexpr(self.blocks):
                    cute.mma_atom_call(atom, rD[n], rA, self.words_b(wX[n], k), rD[n])
        else:
            for ch in range_constexpr(self.chunks):
                rE = self.sums(1)
                for p in range_constexpr(self.vec // 2):
                    rA = self.floats_a(rX, p, ch)
                    rB, rL = self.split(rX[0][2 * p, ch], rX[0][2 * p + 1, ch])
                    self.mma(rE[0], rA, rL)
                    self.mma(rE[0], rA, rB)
                self.gather(rD, rE, ch == 0)
            for j in range_constexpr(2):
                rD[0][j] += rD[0][2 + j]
        return rD

    def words_a(self, wX, k):
        """The A operand of 16 columns in 16 bits: k over q, or x over zeros."""
        rA = cute.make_rmem_tensor((8,), self.io)
        w = cute.recast_tensor(rA, Uint32)
        ch, p = self.word(k)
        for i in range(2):
            w[2 * i] = wX[0][p + i, ch]
            w[2 * i + 1] = wX[1][p + i, ch] if self.blocks == 2 else Uint32(0)
        return rA

    def words_b(self, wX, k, *block):
        """The B operand of 16 columns in 16 bits."""
        rB = cute.make_rmem_tensor((4,), self.io)
        w = cute.recast_tensor(rB, Uint32)
        ch, p = self.word(k)
        for i in range(2):
            w[i] = wX[(p + i, *block, ch)]
        return rB

    def word(self, k):
        """Chunk and first word of the k-th 16 columns."""
        per_chunk = self.vec // 4
        return k // per_chunk, 2 * (k % per_chunk)

    def floats_a(self, rX, p, ch):
        """The A operand of 8 columns: k over q, x over zeros, or high over low parts of x."""
        rA = cute.make_rmem_tensor((4,), Float32)
        for e in range(2):
            x = self.number(rX[0], 2 * p + e, ch)
            if not self.exact:
                rA[2 * e] = self.high(x)
                rA[2 * e + 1] = self.low(x, rA[2 * e])
            else:
                rA[2 * e] = x
                rA[2 * e + 1] = Float32(0)
                if self.blocks == 2:
                    rA[2 * e + 1] = self.number(rX[1], 2 * p + e, ch)
        return rA

    @cute.jit
    def norms(self, rD, scale, at):
        """The factor of vector g of every block: 1 / norm, times scale for a query."""
        r = [Float32(1) for _ in range(self.blocks)]
        for n in range_constexpr(self.blocks):
            if const_expr(self.c.l2norm):
                own = rD[n][2 * n + 1] if at.g % 2 == 1 else rD[n][2 * n]
                r[n] = self.inverse_norm(self.from_lane(own, at.quad + at.g // 2))
        if const_expr(self.c.tile == 8):
            r[1] = r[1] * scale
        else:
            r[0] = r[0] if at.g < 4 else r[0] * scale
        return r

    @cute.jit
    def inverse_norm(self, square):
        """1 / norm of a vector, of its square; 1 where vectors are taken as they are."""
        r = Float32(1)
        if const_expr(self.c.l2norm):
            x = square + NORM_EPS
            y = cute.math.rsqrt(x, fastmath=True)
            r = y * (1.5 - 0.5 * x * y * y)
        return r

    @cute.jit
    def decays(self, g, n, at):
        """Products of g over tokens (2 t, n], (2 t + 1, n] and [0, n]; g is token lane / 4's."""
        i = 2 * at.t
        x0 = self.from_lane(g, 4 * i)
        x1 = self.from_lane(g, 4 * i + 4)
        x0 = x0 if i <= n else Float32(1)
        x1 = x1 if i < n else Float32(1)
        run = x0 * x1
        ahead = self.from_lane(run, at.lane + 1)
        run = run * ahead if at.t < 3 else run
        ahead = self.from_lane(run, at.lane + 2)
        run = run * ahead if at.t < 2 else run
        ahead = self.from_lane(run, at.lane + 1)
        ahead = ahead if at.t < 3 else Float32(1)
        return (ahead * x1, ahead), self.from_lane(run, at.quad)

    @cute.jit
    def factors(self, r, beta, at):
        """What scales a row of results: -beta / norm for a key, scale / norm for a query."""
        if const_expr(self.c.tile == 8):
            return -beta * r[0], r[1]
        return (r[0] * (-beta if at.g < 4 else Float32(1)),)

    def coefficients(self, rD, factors, r_k, later):
        """What u of the lane's two tokens adds to vector g of every block: [j, block]."""
        rM = cute.make_rmem_tensor((2, self.blocks), Float32)
        for n in range(self.blocks):
            for j in range(2):
                rM[j, n] = rD[0][2 * n + j] * factors[n] * (r_k[j] * later[j])
        return rM

    # ---- the state against the window

    @cute.jit
    def products(self, rS, rX):
        """S x of vector g, rows 4 t + i, of every block: [i, block]."""
        rD = self.sums(4)
        if const_expr(self.native):
            atom = cute.make_mma_atom(MmaF16BF16Op(self.io, Float32, (16, 8, 16)))
            wS, wX = cute.recast_tensor(rS, Uint32), [cute.recast_tensor(x, Uint32) for x in rX]
            for k in range_constexpr(self.c.dk // 16):
                rA = self.words_a(wX, k)
                for h in range_constexpr(2):
                    cute.mma_atom_call(atom, rD[h], rA, self.words_b(wS, k, h), rD[h])
        else:
            # short chains cost registers, and show only where q, k and v are float32
            group = const_expr(self.c.dk // 8 if self.exact else self.GROUP)
            for k in range_constexpr(0, self.c.dk // 8, group):
                rE = self.sums(2)
                for i in range_constexpr(group):
                    ch, p = (k + i) // (self.vec // 2), (k + i) % (self.vec // 2)
                    rA = self.floats_a(rX, p, ch)
                    for h in range_constexpr(2):
                        x = [self.number(rS, 2 * p + e, h, ch) for e in range(2)]
                        rB, rL = self.split(*x)
                        if const_expr(self.held is Float32):
                            self.mma(rD[2 + h], rA, rL)
                        self.mma(rE[h], rA, rB)
                self.gather(rD, rE, k == 0)
        rP = cute.make_rmem_tensor((4, self.blocks), Float32)
        for h in range_constexpr(2):
            for j in range_constexpr(2):
                for n in range_constexpr(self.blocks):
                    rP[2 * j + h, n] = rD[h][2 * n + j] + rD[2 + h][2 * n + j]
                if const_expr(not self.exact):
                    rP[2 * j + h, 0] += rD[h][2 + j] + rD[2 + h][2 + j]
        return rP

    @cute.jit
    def solve(self, rP, rV, w, at):
        """Turns rP into u of token g (block 0) and the outputs (last block), token by token."""
        c = self.c
        last = const_expr(self.blocks - 1)
        for n in range_constexpr(self.blocks):
            for i in range_constexpr(4):
                rP[i, n] = rP[i, n] * w.own[n]
        for i in range_constexpr(4):
            rP[i, 0] = cute.math.fma(w.beta, self.number(rV, i), rP[i, 0])
        # u_s goes to keys of later tokens, and to queries from its own token on
        query = at.g + 1 if const_expr(c.tile == 8) else (at.g if at.g < 4 else at.g - 3)
        for s in range_constexpr(c.tile):
            m = [self.from_lane(w.rM[s % 2, n], at.quad + s // 2) for n in range(self.blocks)]
            for i in range_constexpr(4):
                u = self.from_lane(rP[i, 0], 4 * s + at.t)
                if const_expr(c.tile == 8 and s < 7):
                    x = rP[i, 0] + m[0] * u
                    rP[i, 0] = x if at.g > s else rP[i, 0]
                x = rP[i, last] + m[last] * u
                rP[i, last] = x if query > s else rP[i, last]

    @cute.jit
    def put_out(self, mO, rP, head, at, t0):
        """Outputs of the lane's token."""
        rO = cute.make_rmem_tensor((4,), self.io)
        last = const_expr(self.blocks - 1)
        t = t0 + at.g % self.c.tile
        if t < mO.shape[1] and (at.g >= 4 or self.c.tile == 8):
            for i in range_constexpr(4):
                rO[i] = self.io(rP[i, last])
            self.put_quad(self.narrow(mO[head.b, None, head.hv, None], 1)[t, None], rO, at)

    # ---- the state moves on

    @cute.jit
    def share(self, later, before, r, tile, at):
        """What becomes of k u^T of token g and of the state until the last token of a tile."""
        end = const_expr(4 * (tile - 1))
        tau = at.g % tile
        even = self.from_lane(later[0], end + tau // 2)
        odd = self.from_lane(later[1], end + tau // 2)
        return (even if tau % 2 == 0 else odd) * r, self.from_lane(before, end)

    @cute.jit
    def advance(self, rF, gK, t0, steps, rU, share, tile, at):
        """rF <- D rF + sum of the decayed u k^T of up to 8 tokens: a product, then one FMA each.

        Its C fragments are the lane's rows by columns 4 vec ch + vec t + (p, vec / 2 + p).
        """
        e, d = share
        u = cute.make_rmem_tensor((4,), Float32)
        for i in range_constexpr(4):
            u[i] = rU[i, 0] * e if at.g < steps else Float32(0)
        rH, rL = cute.make_rmem_tensor((4,), Float32), cute.make_rmem_tensor((4,), Float32)
        rH.fill(0.0)
        rL.fill(0.0)
        rK = []
        for half in range_constexpr(tile // 4):
            s = at.t + 4 * half
            for h in range_constexpr(2):
                x0 = self.from_lane(u[h], 4 * s + at.g // 2)
                x1 = self.from_lane(u[2 + h], 4 * s + at.g // 2)
                x = x0 if at.g % 2 == 0 else x1
                rH[2 * half + h] = self.nearest(x)
                rL[2 * half + h] = x - rH[2 * half + h]
            gX = gK[t0 + (s if s < steps else steps - 1), None]
            rK.append(cute.make_rmem_tensor((self.vec // 2, self.chunks), gK.element_type))
            for ch in range_constexpr(self.chunks):
                src = cute.local_tile(gX, (self.vec // 2,), (8 * ch + at.g,))
                cute.autovec_copy(src, rK[half][None, ch])
        for ch in range_constexpr(self.chunks):
            for p in range_constexpr(self.vec // 2):
                k = [self.number(x, p, ch) for x in rK] + [Float32(0)]
                rB, rBL = self.split(k[0], k[1])
                rD = cute.make_rmem_tensor((4,), Float32)
                rD.fill(0.0)
                if const_expr(not self.exact):
                    self.mma(rD, rH, rBL)
                self.mma(rD, rL, rB)
                self.mma(rD, rH, rB)
                for h in range_constexpr(2):
                    for j in range_constexpr(2):
                        i = const_expr(self.vec // 2 * j + p)
                        x = cute.math.fma(self.number(rF, i, h, ch), d, rD[2 * h + j])
                        rF[i, h, ch] = rF.element_type(x)

    @cute.jit
    def add(self, rF, gK, t, rU, s, e, g, at):
        """rF <- g rF + (e u_s) k^T, k the row t of gK."""
        rK = cute.make_rmem_tensor((self.vec, self.chunks), gK.element_type)
        self.load_row(gK[t, None], rK, at)
        u = cute.make_rmem_tensor((2,), Float32)
        lane = 4 * s + at.g // 2
        for h in range_constexpr(2):
            even = self.from_lane(rU[h, 0], lane)
            odd = self.from_lane(rU[2 + h, 0], lane)
            u[h] = (even if at.g % 2 == 0 else odd) * e
        for ch in range_constexpr(self.chunks):
            for j in range_constexpr(self.vec):
                k = self.number(rK, j, ch)
                for h in range_constexpr(2):
                    x = rF[j, h, ch]
                    if const_expr(g is not None):
                        x = x * g
                    rF[j, h, ch] = x + u[h] * k

    # ---- the records of a window

    @cute.jit
    def fold(self, gS, rS, draft, n, half, head, at):
        """The first n tokens of the open window become part of the state."""
        if const_expr(self.c.long or self.held is not self.dt):
            rF = self.in_float32(rS)
            for t0 in range(0, n, self.fold_tile):
                self.fold_tokens(rF, draft, t0, n, half, head, at)
            for ch in range_constexpr(self.chunks):
                for h in range_constexpr(2):
                    for j in range_constexpr(self.vec):
                        rS[j, h, ch] = self.held(self.dt(rF[j, h, ch]))
        else:
            self.fold_tokens(rS, draft, 0, n, half, head, at)
        self.store_state(gS, rS, at)

    @cute.jit
    def fold_tokens(self, rF, draft, t0, n, half, head, at):
        """Those of a tile from t0 on."""
        mU, mK, mR, mG, _ = draft
        tile, slot, hv = self.fold_tile, head.slot, head.hv
        gK = self.narrow(mK[slot, half, None, head.hq, None], 3)
        left = n - t0
        tau = at.g % tile
        s = t0 + (tau if tau < left else left - 1)
        rU = cute.make_rmem_tensor((4, 1), Float32)
        self.get_quad(mU[slot, s, hv, None], rU[None, 0], at)
        g = cute.math.exp(mG[slot, half, s, hv])
        g = g if tau < left else Float32(1)
        r = mR[slot, half, s, head.hq]
        later, before = self.decays(g, tau, at)
        share = self.share(later, before, r, tile, at)
        self.advance(rF, gK, t0, left if left < tile else Int32(tile), rU, share, tile, at)

    @cute.jit
    def record(self, draft, rX, rU, w, half, head, at, t0):
        """The window into the other half of the records; k, norms and gates by one warp each."""
        mU, mK, mR, mG, _ = draft
        slot, hv, hq = head.slot, head.hv, head.hq
        t = t0 + at.g
        if t < head.T and at.g < self.c.tile:
            rO = cute.make_rmem_tensor((4,), Float32)
            for i in range_constexpr(4):
                rO[i] = rU[i, 0]
            self.put_quad(mU[slot, t, hv, None], rO, at)
            if at.first == 0:
                if at.t == 0:
                    mG[slot, half, t, hv] = w.log_g
                if head.leads:
                    gK = mK[slot, half, t, hq, None]
                    rK = cute.make_rmem_tensor((self.vec,), mK.element_type)
                    for ch in range_constexpr(self.chunks):
                        for j in range_constexpr(self.vec):
                            rK[j] = rX[0][j, ch].to(mK.element_type)
                        cute.autovec_copy(rK, cute.local_tile(gK, (self.vec,), (4 * ch + at.t,)))
                    if at.t == 0:
                        mR[slot, half, t, hq] = w.r[0]
