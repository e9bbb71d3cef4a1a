"""Triton back end of gated delta net draft verification.

As in gdn.py one warp owns some rows of a head's state. It reads them, folds in the accepted tokens
of the last window, stores them if there were any, and walks the new tokens from there.

Programs of one sequence share its recorded keys. A program learns which half of the records holds
the last window from the mark of its own rows, writes the new window to the other half, and changes
the marks of its own rows only; so no program sees what another one writes in the same launch.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from cutemoe.triton_kernels import launch
from cutemoe.triton_kernels.gdn import (
    constants,
    dot,
    float32,
    gate_of,
    gates,
    grid,
    index_of,
    keys,
    load_flat,
    load_state,
    load_vector,
    norm_factor,
    pick,
    pool_of,
    rank1,
    read,
    save,
    save_state,
    slot_of,
    strides_vk,
    times,
    token,
    view,
)


class Draft(NamedTuple):
    """The contiguous tensors of a GDNDraft, its max_tokens and the heads of v and q."""

    u: object
    k: object
    k_rnorm: object
    log_g: object
    mark: object
    window: object
    HV: object
    HQ: object


@triton.jit
def fold(S, draft, at, h, hq, u_ptr, row, stop, SIZE: tl.constexpr, TILE: tl.constexpr):
    """S after the first `stop` tokens of the window whose records start at token `at`."""
    V_MASK: tl.constexpr = SIZE[0] % TILE[0] != 0
    g_ptr = draft.log_g + at * draft.HV + h
    r_ptr = draft.k_rnorm + at * draft.HQ + hq
    k_ptr = draft.k + (at * draft.HQ + hq) * SIZE[1]
    next_g = tl.load(g_ptr)
    next_r = tl.load(r_ptr)
    next_k = load_vector(k_ptr, SIZE, TILE)
    next_u = read(u_ptr + row, row < SIZE[0], V_MASK)
    for t in range(stop):
        g = tl.exp(next_g)
        x_k = float32(next_k)
        w = next_u * next_r
        if t + 1 < stop:
            g_ptr += draft.HV
            r_ptr += draft.HQ
            k_ptr += draft.HQ * SIZE[1]
            u_ptr += draft.HV * SIZE[0]
        next_g = tl.load(g_ptr)
        next_r = tl.load(r_ptr)
        next_k = load_vector(k_ptr, SIZE, TILE)
        next_u = read(u_ptr + row, row < SIZE[0], V_MASK)
        S = rank1(times(S, g), w, x_k)
    return S


@triton.jit
def rounded(S, DTYPE: tl.constexpr):
    """S as it reads back from memory of another dtype."""
    y = ()
    for c in tl.static_range(len(S)):
        y = y + (S[c].to(DTYPE).to(tl.float32),)
    return y


@triton.jit
def record_keys(ptr, stride, k_ptr, k_stride, T, SIZE: tl.constexpr):
    """Copies T keys; as many at a time as 32 lanes hold in 32 registers."""
    COLS: tl.constexpr = triton.next_power_of_2(SIZE[1])
    MANY: tl.constexpr = max(1024 // COLS, 1)
    cols = tl.arange(0, COLS)[None, :]
    for start in range(0, T, MANY):
        t = (start + tl.arange(0, MANY)).to(tl.int64)[:, None]
        ok = (t < T) & (cols < SIZE[1])
        x = tl.load(k_ptr + t * k_stride + cols, ok, other=0.0)
        tl.store(ptr + t * stride + cols, x.to(ptr.dtype.element_ty), ok)


@launch.entry
@triton.jit(do_not_specialize=["B", "T"])
def gdn_verify_kernel(
    q,
    k,
    v,
    decay,
    write,
    gate,
    state,
    index,
    accepted,
    draft,
    out,
    B,
    T,
    scale,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    STATE: tl.constexpr,
    GROUP: tl.constexpr,
    L2NORM: tl.constexpr,
    TOKENS: tl.constexpr,
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
        if TOKENS:
            for _ in range(T):
                save(out_ptr + rows, tl.zeros([BLOCK_V], tl.float32), rows < SIZE[0], V_MASK)
                out_ptr += out.t
        return

    mark_ptr = draft.mark + (slot * draft.HV + h) * SIZE[0]
    mark = tl.load(mark_ptr + tile * BLOCK_V).to(tl.int32)
    stop = tl.load(accepted.ptr + b * accepted.b)
    stop = tl.minimum(tl.maximum(stop, 0), mark >> 1).to(tl.int32)
    state_ptr = state.ptr + slot * state.slot + h * state.h
    S = load_state(state_ptr, tile, SIZE, TILE, STATE)
    if TOKENS:
        q_ptr = q.ptr + b * q.b + hq * q.h
        k_ptr = k.ptr + b * k.b + hq * k.h
        v_ptr = v.ptr + b * v.b + h * v.h
        next_q = load_vector(q_ptr, SIZE, TILE)
        next_k = load_vector(k_ptr, SIZE, TILE)
        next_v = read(v_ptr + row, row < SIZE[0], V_MASK)
        first = (tile == 0) & (head % GROUP == 0)
    old = (slot * 2 + (mark & 1)) * draft.window
    new = (slot * 2 + 1 - (mark & 1)) * draft.window
    u_ptr = draft.u + (slot * draft.window * draft.HV + h) * SIZE[0]
    if stop > 0:
        S = fold(S, draft, old, h, hq, u_ptr, row, stop, SIZE, TILE)
        save_state(state_ptr, S, tile, SIZE, TILE, STATE)
        S = rounded(S, state.ptr.dtype.element_ty)
    if TOKENS:
        if first:
            record = draft.k + (new * draft.HQ + hq) * SIZE[1]
            record_keys(record, draft.HQ * SIZE[1], k_ptr, k.t, T, SIZE)
        r_ptr = draft.k_rnorm + new * draft.HQ + hq
        for start in range(0, T, 8):
            ts = start + tl.arange(0, 8)
            log_g, beta = gates(decay, write, gate, b, h, ts, T)
            if tile == 0:
                tl.store(draft.log_g + (new + ts) * draft.HV + h, log_g, ts < T)
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
                S, o, u = token(S, x_q, x_k, x_v, r_q, r_k, kq, g_t, beta_t, TILE)
                save(out_ptr + row, o, row < SIZE[0], V_MASK)
                save(u_ptr + row, u, row < SIZE[0], V_MASK)
                if first:
                    tl.store(r_ptr, r_k)
                r_ptr += draft.HQ
                out_ptr += out.t
                u_ptr += draft.HV * SIZE[0]
    mark = 2 * T + 1 - (mark & 1)
    save(mark_ptr + rows, tl.zeros([BLOCK_V], tl.int32) + mark, rows < SIZE[0], V_MASK)


def run(problem, config, x):
    """Runs `gdn_verify` on the tensors x; see cutemoe.gdn.reference.gdn_verify."""
    if problem.B == 0:
        return
    d = x.draft
    compiled_for = constants(problem, config, x)
    gdn_verify_kernel[grid(problem, compiled_for)](
        keys(x.q, compiled_for),
        keys(x.k, compiled_for),
        view(x.v),
        view(x.gates[0]),
        view(x.gates[1]),
        gate_of(x.gates),
        pool_of(x.state),
        index_of(x.state_indices),
        index_of(x.num_accepted),
        Draft(d.u, d.k, d.k_rnorm, d.log_g, d.mark, problem.window, problem.HV, problem.HQ),
        view(x.out),
        problem.B,
        problem.T,
        x.scale,
        STATE=strides_vk(x.state, problem.layout),
        TOKENS=problem.T > 0,
        **compiled_for,
    )
