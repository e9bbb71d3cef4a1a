"""What a warp of the gated delta net kernel does with its 16 rows, apart from the algorithm.

Where a lane's share of a state, a vector and a result lies in memory, how it gets there, and how
numbers become operands of a tensor core and are summed outside of one; cute_delta.py has the map.
"""

import cutlass.cute as cute
from cutlass import (
    BFloat16,
    Float16,
    Float32,
    Float64,
    Int32,
    Int64,
    TFloat32,
    Uint32,
    const_expr,
    range_constexpr,
)
from cutlass.cute.nvgpu.warp import MmaTF32Op

from cutemoe.gdn.cute_plan import Config, fold_tile

TYPES = {
    "bfloat16": BFloat16,
    "float16": Float16,
    "float32": Float32,
    "float64": Float64,
    "int32": Int32,
    "int64": Int64,
}


class Lane:
    """Where this lane is: quad's first lane, g, t, its state rows and its result rows."""

    def __init__(self, first):
        lane = cute.arch.lane_idx()
        self.lane, self.g, self.t = lane, lane // 4, lane % 4
        self.quad = lane - self.t
        self.first = first
        self.row = first + 2 * self.g
        self.out = first + 4 * self.t


class Head:
    """Which sequence, heads and slot this warp works for, and its T tokens; `leads` its group of v
    heads; `accepted` of the tokens of the open window."""

    def __init__(self, b, hv, hq, slot, leads, T):
        self.b, self.hv, self.hq, self.slot, self.leads, self.T = b, hv, hq, slot, leads, T
        self.accepted = None


class Rows:
    """Memory and numbers for one Config."""

    def __init__(self, c: Config):
        self.c = c
        self.io, self.dt = TYPES[c.io], TYPES[c.state]
        self.vk = c.layout == "vk"
        self.verify = c.record != ""
        self.vec = 128 // self.dt.width if self.vk else 4
        self.chunks = c.dk // (4 * self.vec)
        self.exact = self.io.width == 16
        self.blocks = c.tile // 4
        self.held = Float32 if c.loop else self.dt
        self.native = self.exact and self.io is self.held
        self.fold_tile = fold_tile(c.io)
        # k and q are read again behind a fold, so that 16 warps with states of 16 bits fit an SM;
        # float32 states lose 9 % by it (T=8, everything folded, H200, 2026-12-01)
        self.again = self.dt.width == 16 and not c.loop

    # ---- memory

    def narrow(self, gX, which=None):
        """The same view with 32-bit strides, which one head of one sequence fits."""
        dtype = gX.element_type
        div = 1 if which is None else self.alignment(which, dtype) * 8 // dtype.width
        stride = [x if isinstance(x, int) else cute.assume(Int32(x), divby=div) for x in gX.stride]
        return cute.make_tensor(gX.iterator, cute.make_layout(gX.shape, stride=tuple(stride)))

    def alignment(self, which, dtype):
        """Bytes at which a vector of this kind of tensor may be accessed."""
        size = dtype.width // 8
        if not self.c.wide[which]:
            return size
        return (min(16, self.vec * size), 4 * size, 16 if self.vk else 2 * size, 16)[which]

    @cute.jit
    def inside(self, at, h, DV):
        """Row h of the lane exists."""
        return not self.c.ragged or at.row + h < DV

    def whole(self, which):
        """Rows may be accessed as vectors."""
        return self.c.wide[which] and not self.c.ragged

    @cute.jit
    def get_quad(self, gX, rX, at):
        """Four rows of a vector of DV; a row past the end reads the last one."""
        if const_expr(self.whole(1)):
            cute.autovec_copy(cute.local_tile(gX, (4,), (at.out // 4,)), rX)
        else:
            DV = gX.shape[0]
            for i in range_constexpr(4):
                rX[i] = gX[at.out + i if at.out + i < DV else DV - 1]

    @cute.jit
    def put_quad(self, gX, rX, at):
        if const_expr(self.whole(1)):
            cute.autovec_copy(rX, cute.local_tile(gX, (4,), (at.out // 4,)))
        else:
            for i in range_constexpr(4):
                if at.out + i < gX.shape[0]:
                    gX[at.out + i] = rX[i]

    @cute.jit
    def load_row(self, gX, rX, at):
        """This lane's columns of a row of DK numbers."""
        for ch in range_constexpr(self.chunks):
            src = cute.local_tile(gX, (self.vec,), (4 * ch + at.t,))
            cute.autovec_copy(src, rX[None, ch])

    @cute.jit
    def load_state(self, gS, rS, at):
        """The tile; rows past the end repeat the last one."""
        DV = gS.shape[0] if const_expr(self.vk) else gS.shape[1]
        rX = cute.make_rmem_tensor((self.vec,) if self.vk else (2,), self.dt)
        if const_expr(self.vk):
            for h in range_constexpr(2):
                r = at.row + h
                if const_expr(self.c.ragged):
                    r = r if r < DV else DV - 1
                for ch in range_constexpr(self.chunks):
                    src = cute.local_tile(gS[r, None], (self.vec,), (4 * ch + at.t,))
                    if const_expr(self.held is self.dt):
                        self.read(src, rS[None, h, ch])
                    else:
                        self.read(src, rX)
                        for j in range_constexpr(self.vec):
                            rS[j, h, ch] = self.number(rX, j)
        else:
            for ch in range_constexpr(self.chunks):
                for j in range_constexpr(self.vec):
                    gX = gS[(4 * ch + at.t) * self.vec + j, None]
                    if const_expr(self.whole(2)):
                        cute.autovec_copy(cute.local_tile(gX, (2,), (at.row // 2,)), rX)
                    else:
                        for h in range_constexpr(2):
                            rX[h] = gX[at.row + h if at.row + h < DV else DV - 1]
                    for h in range_constexpr(2):
                        rS[j, h, ch] = self.held(rX[h])

    @cute.jit
    def store_state(self, gS, rF, at):
        """The tile in the pool's type."""
        DV = gS.shape[0] if const_expr(self.vk) else gS.shape[1]
        rX = cute.make_rmem_tensor((self.vec,) if self.vk else (2,), self.dt)
        if const_expr(self.vk):
            for h in range_constexpr(2):
                if self.inside(at, h, DV):
                    for ch in range_constexpr(self.chunks):
                        for j in range_constexpr(self.vec):
                            rX[j] = self.dt(rF[j, h, ch])
                        gX = cute.local_tile(gS[at.row + h, None], (self.vec,), (4 * ch + at.t,))
                        cute.autovec_copy(rX, gX)
        else:
            for ch in range_constexpr(self.chunks):
                for j in range_constexpr(self.vec):
                    gX = gS[(4 * ch + at.t) * self.vec + j, None]
                    for h in range_constexpr(2):
                        rX[h] = self.dt(rF[j, h, ch])
                    if const_expr(self.whole(2)):
                        cute.autovec_copy(rX, cute.local_tile(gX, (2,), (at.row // 2,)))
                    else:
                        for h in range_constexpr(2):
                            if at.row + h < DV:
                                gX[at.row + h] = rX[h]

    def read(self, gX, rX):
        """16 bytes of a state; fetches the line it is in."""
        if not self.c.wide[2]:
            return cute.autovec_copy(gX, rX)
        atom = cute.make_copy_atom(
            cute.nvgpu.CopyG2ROp(),
            self.dt,
            num_bits_per_copy=128,
            l2_prefetch_size=cute.nvgpu.L2PrefetchSize.SIZE_128B,
        )
        cute.copy(atom, gX, rX)

    # ---- numbers

    def from_lane(self, x, lane):
        """x of another lane."""
        return cute.arch.shuffle_sync(x, lane)

    def number(self, rX, j, *where):
        """Element j as float32; a bfloat16 by its bits, which costs one instruction."""
        if rX.element_type is BFloat16:
            w = cute.recast_tensor(rX, Uint32)[(j // 2, *where) if where else j // 2]
            return (w & Uint32(0xFFFF0000) if j % 2 else w << 16).bitcast(Float32)
        return Float32(rX[(j, *where) if where else j])

    def high(self, x):
        """x in the 11 significant bits of TF32, so that x - high(x) is exact.

        Cut where one factor is exact; rounded where both are float32: a model of S k over 128
        columns is off by 1.0e-6 at most with cut numbers, by 5.4e-7 with rounded ones, and torch's
        float32 by 2.7e-7.
        """
        return self.nearest(x) if not self.exact else self.cut(x)

    def low(self, x, high):
        """What is left of x, rounded where `high` is, as the tensor core only cuts."""
        return self.nearest(x - high) if not self.exact else x - high

    def cut(self, x):
        """The leading 11 significant bits."""
        return (x.bitcast(Uint32) & Uint32(0xFFFFE000)).bitcast(Float32)

    def nearest(self, x):
        """x rounded to TF32."""
        return self.cut((x.bitcast(Uint32) + Uint32(0x1000)).bitcast(Float32))

    def in_float32(self, rS):
        """The tile as float32 registers; the tile itself where it is."""
        if self.held is Float32:
            return rS
        rF = cute.make_rmem_tensor((self.vec, 2, self.chunks), Float32)
        for ch in range(self.chunks):
            for h in range(2):
                for j in range(self.vec):
                    rF[j, h, ch] = self.number(rS, j, h, ch)
        return rF

    # ---- tensor cores

    def sums(self, n):
        """Zeroed C fragments."""
        rD = [cute.make_rmem_tensor((4,), Float32) for _ in range(n)]
        for d in rD:
            d.fill(0.0)
        return rD

    def gather(self, rD, rE, first):
        """rD += rE, rounded to nearest; an mma truncates, so its chains are kept short."""
        for d, e in zip(rD, rE, strict=False):
            for i in range(4):
                d[i] = e[i] if first else d[i] + e[i]

    def split(self, x0, x1):
        """The B operand of two float32 numbers, and that of what TF32 leaves of them."""
        rB, rL = (cute.make_rmem_tensor((2,), Float32) for _ in range(2))
        for e, x in enumerate((x0, x1)):
            rB[e] = self.high(x)
            rL[e] = self.low(x, rB[e])
        return rB, rL

    def mma(self, rD, rA, rB):
        """rD += rA rB, one m16n8k8 of TF32 registers."""
        atom = cute.make_mma_atom(MmaTF32Op((16, 8, 8)))
        a, b = cute.recast_tensor(rA, TFloat32), cute.recast_tensor(rB, TFloat32)
        cute.mma_atom_call(atom, rD, a, b, rD)
