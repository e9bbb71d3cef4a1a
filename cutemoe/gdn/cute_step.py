# pyright: reportAttributeAccessIssue=false
"""Token by token: states in whole rows, sums by FMA and shuffles.

For one token, and wherever a state is stored after every token, a tensor core has nothing to do
that the lanes do not do sooner: a warp has 8 rows of a state, each spread over its lanes, so that
an instruction moves 512 bytes in a row, and the sums of a token are added up over the lanes at
once.

Lanes     lane = L part + col. A row lies in L lanes, `vec` columns (16 bytes) in each; row i of a
          lane is row first + (32 / L) i + part.
Sums      every step adds what the lane L/2, L/4, .. away has. While a lane has several sums it
          gives half of them away and keeps half, so that in the end it has one: S k of a row in
          the lower half of the lanes, S q in the upper.
Per warp  1 loads: slot | q, k, v, gates of a token, or of eight, each by four lanes | state
          2 k k, q q, k q over the lanes of a token, gates
          3 per token: S k and S q; u in the lower half of the lanes, the output in the upper; u to
            all lanes of its row; S <- g S + u k; stored where anybody needs it

T tokens in a call and T calls of one do the same, bit for bit, where states are float32.

Measured on an H200, 2026-11-30, HV=32, HQ=16, D=128, us at B = 1 / 4 / 16 / 64 / 256: one token
with float32 states 3.6 / 6.6 / 19.4 / 68.9 / 268, on tensor cores 4.7 / 8.0 / 20.7 / 72.1 / 280;
bfloat16 3.1 / 4.7 / 11.2 / 36.7 / 139, on tensor cores 3.7 / 5.7 / 12.5 / 38.1 / 142. Rejected: 16
rows a warp (B=256 272), 4 (270; bfloat16 153); every lane with its part of each token's k k, q q,
k q and with all gates (8 states after 8 tokens, B=1: 10.0 for 7.8; 550 instructions for 250).
"""

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr, range_constexpr

from cutemoe.gdn.cute_delta import GatedDelta


class Place:
    """Where a lane is: its first row and columns, and the row whose output it has."""

    def __init__(self, lane, first, row, col, part, mine, writes, query):
        self.lane, self.first = lane, first
        self.row, self.col, self.part = row, col, part
        self.mine, self.writes, self.query = mine, writes, query


class GatedDeltaStep(GatedDelta):
    """The kernel for one Config with a tile of one token, layout "vk"."""

    def __init__(self, c):
        super().__init__(c)
        # lanes on a row, rows of a lane, lanes that share a sum in the end
        self.lanes = c.dk // self.vec
        self.each = c.rows * self.lanes // 32
        self.sharing = max(self.lanes // (2 * self.each), 1)

    @cute.jit
    def rows(self, inputs, gates, mS, mI, draft, scale, head, first):
        """The rows of this warp."""
        mO = inputs[3]
        T = mO.shape[1]
        at = self.place(first, mO.shape[3])
        window = self.window()
        self.load_window(inputs, gates, window, head, at, 0)
        # the loads above come first: one latency for them and the slot, not two
        cute.arch.sync_warp()
        live = head.slot >= 0 and head.slot < mS.shape[0]
        gS = self.narrow(mS[head.slot, head.hv, None, None], 2)
        rS = cute.make_rmem_tensor((self.vec, self.each), self.dt)
        if live:
            self.load_rows(gS, rS, at)
        # shuffles do not move into the branch below: they run while the state is under way
        factors = cute.make_rmem_tensor((7,), Float32)
        self.prepare(window, factors, scale)
        if live:
            rF = cute.make_rmem_tensor((self.vec, self.each), Float32)
            for i in range_constexpr(self.each):
                for j in range_constexpr(self.vec):
                    rF[j, i] = self.number(rS, j, i)
            if const_expr(self.c.loop):
                for t0 in range(0, T, 8):
                    if t0 > 0:
                        self.load_window(inputs, gates, window, head, at, t0)
                        self.prepare(window, factors, scale)
                    self.steps(rF, inputs, factors, mS, mI, head, at, t0)
            else:
                k, q, _, _ = window
                self.step(rF, k, q, [factors[i] for i in range(6)], mO, mS, mI, head, at, 0)
            if const_expr(self.c.update):
                self.store_rows(gS, rF, at)
        elif at.writes:
            for t in range(T if const_expr(self.c.loop) else 1):
                mO[head.b, t, head.hv, at.mine] = self.io(0.0)

    @cute.jit
    def place(self, first, DV):
        """Of this lane."""
        lane = cute.arch.lane_idx()
        part, col = lane // self.lanes, lane % self.lanes
        mine = first + (col // self.sharing % self.each) * (32 // self.lanes) + part
        query = col >= self.lanes // 2
        writes = query and col % self.sharing == 0
        if const_expr(self.c.ragged):
            writes = writes and mine < DV
            mine = mine if mine < DV else DV - 1
        return Place(lane, first, first + part, col, part, mine, writes, query)

    # ---- tokens

    def window(self):
        """k and q, v and gates of the lane's token: its columns of a row where it has all of one,
        every fourth chunk where four lanes have it; v of its row, or of two."""
        chunks, rows = (self.lanes // 4, 2) if self.c.loop else (1, 1)
        kinds = [((self.vec, chunks), self.io), ((self.vec, chunks), self.io), ((rows,), self.io)]
        kinds.append(((len(self.c.gates),), Float32))
        return [cute.make_rmem_tensor(shape, dtype) for shape, dtype in kinds]

    @cute.jit
    def load_window(self, inputs, gates, window, head, at, t0):
        """Token t0, or 8 from there on; past the last one that one again."""
        mQ, mK, mV, _ = inputs
        rK, rQ, rV, rG = window
        last, DV = mV.shape[1] - 1, mV.shape[3]
        t, chunk, apart = t0, at.col, self.lanes
        if const_expr(self.c.loop):
            t, chunk, apart = t0 + at.lane // 4, at.lane % 4, 4
            t = t if t < last else last
        for mX, rX in ((mK, rK), (mQ, rQ)):
            gX = self.narrow(mX[head.b, None, head.hq, None], 0)[t, None]
            for i in range_constexpr(cute.size(rX) // self.vec):
                src = cute.local_tile(gX, (self.vec,), (chunk + apart * i,))
                cute.autovec_copy(src, rX[None, i])
        gV = self.narrow(mV[head.b, None, head.hv, None], 1)[t, None]
        for i in range_constexpr(cute.size(rV)):
            r = at.mine
            if const_expr(self.c.loop):
                r = at.first + 2 * chunk + i
                if const_expr(self.c.ragged):
                    r = r if r < DV else DV - 1
            rV[i] = gV[r]
        self.load_gates(gates, rG, head.b, head.hv, t)

    @cute.jit
    def prepare(self, window, factors, scale):
        """Of the lane's token: g, beta, factors of k and of q and their product, v of its rows."""
        rK, rQ, rV, rG = window
        log_g, beta = self.gate(rG)
        kk, qq, kq = [], [], []
        for i in range_constexpr(cute.size(rK) // self.vec):
            sums = [Float32(0), Float32(0), Float32(0)]
            for j in range_constexpr(self.vec):
                k, q = self.number(rK, j, i), self.number(rQ, j, i)
                pairs = ((k, k), (q, q), (k, q))
                sums = [cute.math.fma(x, y, s) for s, (x, y) in zip(sums, pairs, strict=True)]
            for of, x in zip((kk, qq, kq), sums, strict=True):
                of.append(x)
        kk, qq, kq = [self.over_chunks(x) for x in (kk, qq, kq)]
        r_k, r_q = self.inverse_norm(kk), self.inverse_norm(qq) * scale
        made = [cute.math.exp(log_g), beta, r_k, r_q, kq * r_k * r_q]
        for i in range_constexpr(5):
            factors[i] = made[i]
        factors[5] = Float32(rV[0])
        if const_expr(self.c.loop):
            factors[6] = Float32(rV[1])

    def over_chunks(self, sums):
        """The sum of a vector, in the order of `over_lanes` whoever has its chunks."""
        while len(sums) > 1:
            half = len(sums) // 2
            sums = [sums[i] + sums[i + half] for i in range(half)]
        away = 2 if self.c.loop else self.lanes // 2
        while away > 0:
            sums = [sums[0] + cute.arch.shuffle_sync_bfly(sums[0], away)]
            away //= 2
        return sums[0]

    @cute.jit
    def steps(self, rF, inputs, factors, mS, mI, head, at, t0):
        """Up to 8 tokens of a window; k and q come one token ahead."""
        mQ, mK, _, mO = inputs
        T = mO.shape[1]
        gK, gQ = (self.narrow(m[head.b, None, head.hq, None], 0) for m in (mK, mQ))
        now, ahead = ([cute.make_rmem_tensor((self.vec, 1), self.io) for _ in "kq"] for _ in "12")
        self.load_vectors(gK, gQ, now, at, t0)
        left = T - t0
        mine = at.mine - at.first
        for s in range(left if left < 8 else Int32(8)):
            self.load_vectors(gK, gQ, ahead, at, t0 + s + 1)
            of = [self.from_lane(factors[i], 4 * s) for i in range(5)]
            v = [self.from_lane(factors[5 + i], 4 * s + mine // 2) for i in range(2)]
            of.append(v[1] if mine % 2 == 1 else v[0])
            self.step(rF, now[0], now[1], of, mO, mS, mI, head, at, t0 + s)
            for x, y in zip(now, ahead, strict=True):
                for i in range_constexpr(self.vec):
                    x[i, 0] = y[i, 0]

    @cute.jit
    def load_vectors(self, gK, gQ, to, at, t):
        """The lane's columns of k and q of a token, or of the last one."""
        last = gK.shape[0] - 1
        t = t if t < last else last
        for gX, rX in zip((gK, gQ), to, strict=True):
            src = cute.local_tile(gX[t, None], (self.vec,), (at.col,))
            cute.autovec_copy(src, rX[None, 0])

    @cute.jit
    def step(self, rF, rK, rQ, factors, mO, mS, mI, head, at, t):
        """A token: its output, and the state after it."""
        g, beta, r_k, r_q, kq, v = factors
        k, q = ([self.number(r, j, 0) for j in range(self.vec)] for r in (rK, rQ))
        sums = []
        for x in (k, q):
            for i in range_constexpr(self.each):
                s = rF[0, i] * x[0]
                for j in range_constexpr(1, self.vec):
                    s = cute.math.fma(rF[j, i], x[j], s)
                sums.append(s)
        r = r_q if at.query else r_k
        s = self.over_lanes(sums) * (g * r)
        u = beta * (v - s)
        out = s + cute.arch.shuffle_sync_bfly(u, self.lanes // 2) * kq
        if at.writes:
            mO[head.b, t, head.hv, at.mine] = self.io(out)
        if const_expr(self.c.update or self.c.snapshots or self.c.targets != "" or self.c.loop):
            for i in range_constexpr(self.each):
                w = self.from_lane(u * r_k, at.part * self.lanes + i * self.sharing)
                for j in range_constexpr(self.vec):
                    rF[j, i] = cute.math.fma(w, k[j], rF[j, i] * g)
        if const_expr(self.c.snapshots):
            self.store_rows(self.narrow(mI[head.b, t, head.hv, None, None], 2), rF, at)
        if const_expr(self.c.targets != ""):
            to = Int64(mI[head.b, t])
            if to >= 0 and to < mS.shape[0]:
                self.store_rows(self.narrow(mS[to, head.hv, None, None], 2), rF, at)

    def over_lanes(self, sums):
        """Of sums over the lanes of a row, the one of this lane."""
        lane, away = cute.arch.lane_idx(), self.lanes // 2
        while away > 0:
            upper, half = (lane & away) != 0, len(sums) // 2
            given = sums
            if half > 0:
                given = [self.choose(upper, sums[i], sums[i + half]) for i in range(half)]
                sums = [self.choose(upper, sums[i + half], sums[i]) for i in range(half)]
            sums = [x + cute.arch.shuffle_sync_bfly(y, away) for x, y in zip(sums, given)]
            away //= 2
        return sums[0]

    @cute.jit
    def choose(self, condition, x, y):
        """x or y, without a branch."""
        return x if condition else y

    # ---- states

    @cute.jit
    def load_rows(self, gS, rS, at):
        """Rows of this lane; past the last one that one again."""
        DV = gS.shape[0]
        for i in range_constexpr(self.each):
            r = at.row + i * (32 // self.lanes)
            if const_expr(self.c.ragged):
                r = r if r < DV else DV - 1
            self.read(cute.local_tile(gS[r, None], (self.vec,), (at.col,)), rS[None, i])

    @cute.jit
    def store_rows(self, gS, rF, at):
        rX = cute.make_rmem_tensor((self.vec,), self.dt)
        for i in range_constexpr(self.each):
            r = at.row + i * (32 // self.lanes)
            if not self.c.ragged or r < gS.shape[0]:
                for j in range_constexpr(self.vec):
                    rX[j] = self.dt(rF[j, i])
                cute.autovec_copy(rX, cute.local_tile(gS[r, None], (self.vec,), (at.col,)))
