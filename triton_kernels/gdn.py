"""Triton back end of gated delta net decode.

One warp owns BLOCK_V rows of one head's state and walks the tokens with them in registers, read
once and written once however many tokens there are. The columns are cut into chunks of BLOCK_K; a
chunk is a tile [BLOCK_V / ROWS, ROWS, BLOCK_K] whose last two dimensions are spread over the lanes
(float32: 2 rows of 16 lanes, 16 bytes each). A sum over K is one multiply-add a chunk and element
and 4 shuffles for two rows at once, where 32 lanes on one row take 5 for every row; with 8 lanes on
a row it would be 3 for four, at the price of twice the registers for q and k.

Keys and queries are loaded straight into the lanes that need them, one token ahead, and once more
without repetition for their norms and k q. These enter as scalars afterwards, off the path from
token to token; for the same reason the output is S' q + u (k q) with S' the decayed state.

Every multiply-add is written as one, the compiler may fuse no other, and sums are taken in the
lanes that hold the state or in integers: a state has the same bits from either kernel, any tile
and any batch, which is what makes folding recorded tokens the same as decoding them. The bits do
depend on which of the two sums it is, and so on whether strides are multiples of 16 elements.

H200, 2026-11-21, HV=32, HQ=16, D=128, float32 states, T=4, us at B = 1 / 16 / 64: snapshots
6.5 / 47 / 179 (streaming roof 4.2 / 44 / 174), update 6.0 / 28 / 87 (2.8 / 18.5 / 66), output only
5.4 / 21 / 63 (2.1 / 10 / 33), measured before the norms had loads of their own (2 % more
instructions). Without snapshots it is bound by issue, about 40 instructions a row and token.
Rejected: sums of neighbours by reshape, which no lane order changes (through shared memory, 12
times the instructions on sm_90); 4 and 32 rows a warp, no loads ahead, 8 lanes a row (112 us at
B=64).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from cutemoe.triton_kernels import launch

# sequences along the second grid dimension, as in the kernels
GRID_Y = 32768


class View(NamedTuple):
    """A tensor and its strides, in elements, over sequence, token and head."""

    ptr: object
    b: object
    t: object
    h: object


class Snapshots(NamedTuple):
    """States after each token with strides as in View, or their slots with those of [B, T]."""

    ptr: object
    b: object
    t: object
    h: object
    slots: object
    slots_b: object
    slots_t: object


class Gate(NamedTuple):
    """A_log and dt_bias with their strides."""

    A_log: object
    A_log_h: object
    dt_bias: object
    dt_bias_h: object


class Pool(NamedTuple):
    """A state pool, how many states it has, and its strides over slot and head."""

    ptr: object
    slots: object
    slot: object
    h: object


class Index(NamedTuple):
    """An integer for each sequence, and the stride."""

    ptr: object
    b: object


@triton.jit
def read(ptr, ok, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(ptr, ok, other=0.0)
    else:
        return tl.load(ptr)


@triton.jit
def save(ptr, x, ok, MASKED: tl.constexpr):
    if MASKED:
        tl.store(ptr, x.to(ptr.dtype.element_ty), ok)
    else:
        tl.store(ptr, x.to(ptr.dtype.element_ty))


@triton.jit
def slot_of(index, b):
    if index.ptr is None:
        return b
    else:
        return tl.load(index.ptr + b * index.b).to(tl.int64)


@triton.jit
def cells(tile, c, SIZE: tl.constexpr, TILE: tl.constexpr, STRIDES: tl.constexpr):
    """Offsets [BLOCK_V, BLOCK_K] of a chunk in one head's state, and which exist."""
    row = (tile * TILE[0] + tl.arange(0, TILE[0]))[:, None]
    col = (c * TILE[2] + tl.arange(0, TILE[2]))[None, :]
    ok = (row < SIZE[0]) & (col < SIZE[1])
    if SIZE[0] * STRIDES[0] + SIZE[1] * STRIDES[1] >= 2**31:
        row = row.to(tl.int64)
        col = col.to(tl.int64)
    return row * STRIDES[0] + col * STRIDES[1], ok


@triton.jit
def load_state(ptr, tile, SIZE: tl.constexpr, TILE: tl.constexpr, STRIDES: tl.constexpr):
    """The chunks of a tile in float32, each [BLOCK_V / ROWS, ROWS, BLOCK_K]."""
    SHAPE: tl.constexpr = (TILE[0] // TILE[1], TILE[1], TILE[2])
    S = ()
    for c in tl.static_range((SIZE[1] + TILE[2] - 1) // TILE[2]):
        at, ok = cells(tile, c, SIZE, TILE, STRIDES)
        x = read(ptr + at, ok, SIZE[0] % TILE[0] != 0 or (c + 1) * TILE[2] > SIZE[1])
        S = S + (tl.reshape(x.to(tl.float32), SHAPE),)
    return S


@triton.jit
def save_state(ptr, S, tile, SIZE: tl.constexpr, TILE: tl.constexpr, STRIDES: tl.constexpr):
    SHAPE: tl.constexpr = (TILE[0], TILE[2])
    for c in tl.static_range(len(S)):
        at, ok = cells(tile, c, SIZE, TILE, STRIDES)
        x = tl.reshape(S[c], SHAPE)
        save(ptr + at, x, ok, SIZE[0] % TILE[0] != 0 or (c + 1) * TILE[2] > SIZE[1])


@triton.jit
def load_vector(ptr, SIZE: tl.constexpr, TILE: tl.constexpr):
    """The chunks of a key or query, each [1, ROWS or 1, BLOCK_K], in the dtype of memory."""
    col = tl.arange(0, TILE[2])
    if TILE[3] > 1:
        # contiguity TILE[3], that of the state's loads, and as many copies as a state has rows:
        # Triton then gives both the same lanes and moves nothing between them
        col = ((col // TILE[3]) * TILE[3] + col % TILE[3])[None, None, :]
        col += tl.arange(0, TILE[1])[None, :, None] * 0
    else:
        col = col[None, None, :]
    x = ()
    for c in tl.static_range((SIZE[1] + TILE[2] - 1) // TILE[2]):
        at = c * TILE[2] + col
        x = x + (read(ptr + at, at < SIZE[1], (c + 1) * TILE[2] > SIZE[1]),)
    return x


@triton.jit
def load_flat(ptr, SIZE: tl.constexpr):
    """A key or query once, for sums over it alone; its lines are in L1 from `load_vector`."""
    COLS: tl.constexpr = triton.next_power_of_2(SIZE[1])
    col = tl.arange(0, COLS)
    return read(ptr + col, col < SIZE[1], SIZE[1] != COLS).to(tl.float32)


@triton.jit
def float32(x):
    y = ()
    for c in tl.static_range(len(x)):
        y = y + (x[c].to(tl.float32),)
    return y


@triton.jit
def times(S, g):
    y = ()
    for c in tl.static_range(len(S)):
        y = y + (S[c] * g,)
    return y


@triton.jit
def order_free_sum(p, AXIS: tl.constexpr):
    """The sum in integers of 2^-55 of the largest element: no order of it changes a bit."""
    top = tl.max(tl.abs(p), axis=AXIS, keep_dims=True)
    exponent = (top.to(tl.int32, bitcast=True) >> 23).to(tl.int64)
    up = ((1023 + 127 + 55 - exponent) << 52).to(tl.float64, bitcast=True)
    down = ((1023 - 127 - 55 + exponent) << 52).to(tl.float64, bitcast=True)
    n = tl.sum((p.to(tl.float64) * up).to(tl.int64), axis=AXIS, keep_dims=True)
    plain = tl.sum(p, axis=AXIS, keep_dims=True)
    return tl.where(plain - plain == 0.0, (n.to(tl.float64) * down).to(tl.float32), plain)


@triton.jit
def dot_rows(S, x, TILE: tl.constexpr):
    """<S[row], x> for every row: chunks [.., .., BLOCK_K] and [1, .., BLOCK_K] give [.., .., 1]."""
    p = S[0] * x[0]
    for c in tl.static_range(1, len(x)):
        p = tl.fma(S[c], tl.broadcast_to(x[c], S[c].shape), p)
    if TILE[4]:
        return order_free_sum(p, 2)
    else:
        return tl.sum(p, axis=2, keep_dims=True)


@triton.jit
def dot(x, y, TILE: tl.constexpr):
    """<x, y> of two vectors, a scalar."""
    if TILE[4]:
        return tl.sum(order_free_sum(x * y, 0), axis=0)
    else:
        return tl.sum(x * y, axis=0)


@triton.jit
def rank1(S, u, x):
    """S + u x^T."""
    y = ()
    for c in tl.static_range(len(S)):
        u_c = tl.broadcast_to(u, S[c].shape)
        y = y + (tl.fma(u_c, tl.broadcast_to(x[c], S[c].shape), S[c]),)
    return y


@triton.jit
def log1p(x):
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def gates(decay, write, gate, b, h, ts, T):
    """log g and beta of tokens ts; log g is 0 where a factor of it is, whatever the other."""
    at = decay.ptr + b * decay.b + h * decay.h + ts.to(tl.int64) * decay.t
    log_g = tl.load(at, ts < T, other=0.0).to(tl.float32)
    at = write.ptr + b * write.b + h * write.h + ts.to(tl.int64) * write.t
    beta = tl.load(at, ts < T, other=0.0).to(tl.float32)
    if gate is not None:
        rate = tl.exp(tl.load(gate.A_log + h * gate.A_log_h).to(tl.float32))
        x = log_g + tl.load(gate.dt_bias + h * gate.dt_bias_h).to(tl.float32)
        soft = tl.where(x > 20.0, x, log1p(tl.exp(tl.minimum(x, 20.0))))
        log_g = tl.where(soft == 0.0, 0.0, -rate * soft)
        log_g = tl.where(rate == 0.0, 0.0, log_g)
        beta = tl.sigmoid(beta)
    return log_g, beta


@triton.jit
def pick(x, ts, t):
    """x of token t as a scalar."""
    return tl.sum(tl.where(ts == t, x, 0.0), axis=0)


@triton.jit
def norm_factor(x, TILE: tl.constexpr, L2NORM: tl.constexpr):
    if L2NORM:
        return tl.rsqrt(dot(x, x, TILE) + 1e-6)
    else:
        return tl.full((), 1.0, tl.float32)


@triton.jit
def token(S, x_q, x_k, x_v, r_q, r_k, kq, g, beta, TILE: tl.constexpr):
    """One token: the state after it, the output and u [.., .., 1].

    r_q and r_k are the factors of q (with the scale) and k, kq is their product without factors.
    """
    S = times(S, g)
    u = beta * tl.fma(dot_rows(S, x_k, TILE), tl.zeros_like(x_v) - r_k, x_v)
    w = u * r_k
    o = tl.fma(w, tl.zeros_like(w) + kq, dot_rows(S, x_q, TILE)) * r_q
    return rank1(S, w, x_k), o, u


@launch.entry
@triton.jit(do_not_specialize=["B", "T"])
def gdn_decode_kernel(
    q,
    k,
    v,
    decay,
    write,
    gate,
    state,
    index,
    snap,
    out,
    B,
    T,
    scale,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    STATE: tl.constexpr,
    SNAP: tl.constexpr,
    GROUP: tl.constexpr,
    L2NORM: tl.constexpr,
    UPDATE: tl.constexpr,
):
    BLOCK_V: tl.constexpr = TILE[0]
    ROWS: tl.constexpr = TILE[1]
    TILES: tl.constexpr = (SIZE[0] + BLOCK_V - 1) // BLOCK_V
    V_MASK: tl.constexpr = SIZE[0] % BLOCK_V != 0
    b = tl.program_id(2).to(tl.int64) * 32768 + tl.program_id(1)
    if b >= B:
        return
    tile = tl.program_id(0) % TILES
    head = tl.program_id(0) // TILES
    h = head.to(tl.int64)
    hq = (head // GROUP).to(tl.int64)
    rows = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    row = tl.arange(0, BLOCK_V // ROWS)[:, None, None] * ROWS + tl.arange(0, ROWS)[None, :, None]
    row += tile * BLOCK_V

    out_ptr = out.ptr + b * out.b + h * out.h
    slot = slot_of(index, b)
    if (slot < 0) | (slot >= state.slots):
        for _ in range(T):
            save(out_ptr + rows, tl.zeros([BLOCK_V], tl.float32), rows < SIZE[0], V_MASK)
            out_ptr += out.t
        return

    state_ptr = state.ptr + slot * state.slot + h * state.h
    S = load_state(state_ptr, tile, SIZE, TILE, STATE)
    q_ptr = q.ptr + b * q.b + hq * q.h
    k_ptr = k.ptr + b * k.b + hq * k.h
    v_ptr = v.ptr + b * v.b + h * v.h
    next_q = load_vector(q_ptr, SIZE, TILE)
    next_k = load_vector(k_ptr, SIZE, TILE)
    next_v = read(v_ptr + row, row < SIZE[0], V_MASK)
    if snap.ptr is not None:
        snap_ptr = snap.ptr + b * snap.b + h * snap.h
    for start in range(0, T, 8):
        ts = start + tl.arange(0, 8)
        log_g, beta = gates(decay, write, gate, b, h, ts, T)
        g = tl.exp(log_g)
        for t in range(start, tl.minimum(start + 8, T)):
            x_q = float32(next_q)
            x_k = float32(next_k)
            x_v = next_v.to(tl.float32)
            y_q = load_flat(q_ptr, SIZE)
            y_k = load_flat(k_ptr, SIZE)
            if t + 1 < T:
                q_ptr += q.t
                k_ptr += k.t
                v_ptr += v.t
            next_q = load_vector(q_ptr, SIZE, TILE)
            next_k = load_vector(k_ptr, SIZE, TILE)
            next_v = read(v_ptr + row, row < SIZE[0], V_MASK)
            r_q = norm_factor(y_q, TILE, L2NORM) * scale
            r_k = norm_factor(y_k, TILE, L2NORM)
            kq = dot(y_k, y_q, TILE)
            g_t = pick(g, ts, t)
            beta_t = pick(beta, ts, t)
            S, o, _ = token(S, x_q, x_k, x_v, r_q, r_k, kq, g_t, beta_t, TILE)
            save(out_ptr + row, o, row < SIZE[0], V_MASK)
            out_ptr += out.t
            if snap.ptr is not None:
                save_state(snap_ptr, S, tile, SIZE, TILE, SNAP)
                snap_ptr += snap.t
            if snap.slots is not None:
                to = tl.load(snap.slots + b * snap.slots_b + t * snap.slots_t).to(tl.int64)
                if (to >= 0) & (to < state.slots):
                    to_ptr = state.ptr + to * state.slot + h * state.h
                    save_state(to_ptr, S, tile, SIZE, TILE, STATE)
    if UPDATE:
        save_state(state_ptr, S, tile, SIZE, TILE, STATE)


def strides(x, dims):
    """The first strides of x; 0, which divides by 16, for a dimension of one element."""
    return tuple(s if n > 1 else 0 for n, s in zip(x.shape[:dims], x.stride(), strict=False))


def view(x):
    """A tensor [B, T, heads, ...] with its strides; None of no tensor."""
    return View(None, 0, 0, 0) if x is None else View(x, *strides(x, 3))


def snapshots_of(states, slots):
    """Where the state after each token goes: its own tensor, slots of the pool, or nowhere."""
    where = (None, 0, 0) if slots is None else (slots, *slots.stride())
    return Snapshots(*view(states), *where)


def aligned(x):
    """Every row starts on 16 bytes, and Triton can tell."""
    return x.data_ptr() % 16 == 0 and all(s % 16 == 0 for s in strides(x, x.dim() - 1))


def keys(x, constants):
    """The view of q or k; where sums come in the order of lanes, every row starts on 16 bytes."""
    if not constants["TILE"][4] and not aligned(x):
        x = torch.empty_like(x, memory_format=torch.contiguous_format).copy_(x)
    return view(x)


def index_of(x):
    """An integer tensor [B] with its stride; None of no tensor."""
    return Index(None, 0) if x is None else Index(x, x.stride(0))


def gate_of(gates):
    """A_log and dt_bias of raw gates, None of given ones."""
    if len(gates) == 2:
        return None
    return Gate(gates[2], gates[2].stride(0), gates[3], gates[3].stride(0))


def pool_of(state):
    """A state pool with its size and outer strides."""
    return Pool(state, state.shape[0], *strides(state, 2))


def strides_vk(x, layout):
    """Strides of a state's rows (V) and columns (K), whose memory is laid out as `layout`."""
    return (x.stride(-2), 1) if layout == "vk" else (1, x.stride(-2))


def constants(problem, config, x):
    """Compile-time arguments that both kernels take.

    Where the rows of a state do not start on 16 bytes, or lanes hold fewer numbers of a key than of
    a state, Triton may sum in other lanes in one kernel than in the other. Sums are then taken in
    integers, which costs time and registers and keeps the bits the same.
    """
    wide = x.q.element_size() * config.vector > 16
    order_free = wide or problem.DK % 16 != 0 or not aligned(x.state)
    block_v = max(config.block_v // 4, 1) if order_free else config.block_v
    rows = min(config.rows, block_v)
    return {
        "SIZE": (problem.DV, problem.DK),
        "TILE": (block_v, rows, config.block_k, config.vector, order_free),
        "GROUP": problem.HV // problem.HQ,
        "L2NORM": problem.qk_l2norm,
        "num_warps": 1,
        "enable_fp_fusion": False,
    }


def grid(problem, constants):
    """Row tiles of all heads; sequences, 32768 at a time."""
    B, tiles = problem.B, triton.cdiv(problem.DV, constants["TILE"][0])
    return (problem.HV * tiles, min(B, GRID_Y), triton.cdiv(B, GRID_Y))


def run(problem, config, x):
    """Runs `gdn_decode` on the tensors x; see cutemoe.gdn.reference.gdn_decode."""
    if problem.B == 0 or problem.T == 0:
        return
    if problem.rounding == "eager":
        # it builds on this module
        from cutemoe.triton_kernels import gdn_eager

        gdn_eager.run(problem, x)
        return
    snap = x.intermediate_states
    state = strides_vk(x.state, problem.layout)
    compiled_for = constants(problem, config, x)
    gdn_decode_kernel[grid(problem, compiled_for)](
        keys(x.q, compiled_for),
        keys(x.k, compiled_for),
        view(x.v),
        view(x.gates[0]),
        view(x.gates[1]),
        gate_of(x.gates),
        pool_of(x.state),
        index_of(x.state_indices),
        snapshots_of(snap, x.intermediate_indices),
        view(x.out),
        problem.B,
        problem.T,
        x.scale,
        STATE=state,
        SNAP=state if snap is None else strides_vk(snap, problem.layout),
        UPDATE=problem.update,
        **compiled_for,
    )
