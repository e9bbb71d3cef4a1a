"""Gated delta net decode with the bits of torch's operators, one after the other, on a GPU.

Products are rounded before they are added, functions are those of CUDA's library, and sums are
taken in the order of torch's reductions over 128 numbers (aten/src/ATen/native/cuda/Reduce.cuh):

| sum | order |
|---|---|
| over a dimension that is not the last | 16 sums of every 16th number; those 4 apart in turn; the first and third, the second and fourth of the four left; both |
| over the last dimension | four neighbours in turn; then both halves of what is left, five times |

A program owns BLOCK_V columns of one head's state [DK, DV] in registers, as eight tiles of 16 rows.
"""  # noqa: E501

import math
from ctypes import c_float

import triton
import triton.language as tl

from cutemoe.triton_kernels import launch, numeric
from cutemoe.triton_kernels.gdn import GRID_Y, index_of, pool_of, slot_of, strides_vk, view

BLOCK_V = 32


@triton.jit
def rows_sum(x):
    """Sums [BLOCK_V] of the 16 sums [16, BLOCK_V] that torch's threads hold."""
    BLOCK: tl.constexpr = x.shape[1]
    # row 4 (2 a + b) + y: accumulator 2 a + b of thread y
    x = tl.permute(tl.reshape(x, (2, 2, 4, BLOCK)), (2, 3, 0, 1))
    even, odd = tl.split(x)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    x = ((first + second) + third) + fourth
    # thread y = 2 c + d
    low, high = tl.split(tl.permute(tl.reshape(x, (2, 2, BLOCK)), (2, 1, 0)))
    even, odd = tl.split(low + high)
    return even + odd


@triton.jit
def dot(S, x):
    """x S [BLOCK_V] of a state in tiles [16, BLOCK_V] and a vector in parts [16]."""
    acc = S[0] * x[0][:, None]
    for j in tl.static_range(1, len(S)):
        acc = acc + S[j] * x[j][:, None]
    return rows_sum(acc)


@triton.jit
def square_sum(x):
    """The sum of the squares of a vector [128]."""
    even, odd = tl.split(tl.reshape(x * x, (32, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    x = ((first + second) + third) + fourth
    for level in tl.static_range(5):
        low, high = tl.split(tl.permute(tl.reshape(x, (2, 16 >> level)), (1, 0)))
        x = low + high
    return tl.sum(x, axis=0)


@triton.jit
def vector(ptr, L2NORM: tl.constexpr):
    """A key or query in parts [16], normalised."""
    r = 1.0
    if L2NORM:
        whole = tl.load(ptr + tl.arange(0, 128)).to(tl.float32)
        # the bits of torch's: 0 of 4096 differ on an H200, 2026-11-30
        r = tl.rsqrt(square_sum(whole) + 1e-6)
    x = ()
    for j in tl.static_range(8):
        x = x + (tl.load(ptr + 16 * j + tl.arange(0, 16)).to(tl.float32) * r,)
    return x


@launch.entry
@triton.jit(do_not_specialize=["B", "T"])
def gdn_eager_kernel(
    q,
    k,
    v,
    log_g,
    beta,
    state,
    index,
    out,
    B,
    T,
    scale,
    STATE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    L2NORM: tl.constexpr,
    UPDATE: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    """STATE: strides of V and K; scale: a factor of q."""
    b = tl.program_id(2).to(tl.int64) * 32768 + tl.program_id(1)
    if b >= B:
        return
    head = tl.program_id(0) // (128 // BLOCK)
    h, hq = head.to(tl.int64), (head // GROUP).to(tl.int64)
    cols = tl.program_id(0) % (128 // BLOCK) * BLOCK + tl.arange(0, BLOCK)
    out_ptr = out.ptr + b * out.b + h * out.h + cols
    slot = slot_of(index, b)
    if (slot < 0) | (slot >= state.slots):
        for _ in range(T):
            tl.store(out_ptr, tl.zeros([BLOCK], out.ptr.dtype.element_ty))
            out_ptr += out.t
        return
    cells = tl.arange(0, 16)[:, None] * STATE[1] + cols[None, :] * STATE[0]
    cells_ptr = state.ptr + slot * state.slot + h * state.h + cells
    S = ()
    for j in tl.static_range(8):
        S = S + (tl.load(cells_ptr + 16 * j * STATE[1]),)
    for t in range(T):
        x_q = vector(q.ptr + b * q.b + t * q.t + hq * q.h, L2NORM)
        x_k = vector(k.ptr + b * k.b + t * k.t + hq * k.h, L2NORM)
        x_v = tl.load(v.ptr + b * v.b + t * v.t + h * v.h + cols).to(tl.float32)
        g = tl.load(log_g.ptr + b * log_g.b + t * log_g.t + h * log_g.h)
        decay = numeric.library_exp(g, PORTABLE)
        write = tl.load(beta.ptr + b * beta.b + t * beta.t + h * beta.h).to(tl.float32)
        kept, y_q = (), ()
        for j in tl.static_range(8):
            kept = kept + (S[j] * decay,)
            y_q = y_q + (x_q[j] * scale,)
        u = (x_v - dot(kept, x_k)) * write
        S = ()
        for j in tl.static_range(8):
            S = S + (kept[j] + x_k[j][:, None] * u[None, :],)
        tl.store(out_ptr, dot(S, y_q).to(out.ptr.dtype.element_ty))
        out_ptr += out.t
    if UPDATE:
        for j in tl.static_range(8):
            tl.store(cells_ptr + 16 * j * STATE[1], S[j])


def inverse(x):
    """1 / x as a float32."""
    return math.inf if x == 0 else c_float(1.0 / x).value


def run(problem, x):
    """Runs `gdn_decode` on the tensors x; see cutemoe.gdn.reference.eager_rule."""
    tiles = problem.DV // BLOCK_V
    rows = min(problem.B, GRID_Y)
    gdn_eager_kernel[(problem.HV * tiles, rows, triton.cdiv(problem.B, GRID_Y))](
        view(x.q),
        view(x.k),
        view(x.v),
        view(x.gates[0]),
        view(x.gates[1]),
        pool_of(x.state),
        index_of(x.state_indices),
        view(x.out),
        problem.B,
        problem.T,
        # torch multiplies by the inverse of what it is asked to divide by
        inverse(inverse(x.scale)),
        STATE=strides_vk(x.state, problem.layout),
        GROUP=problem.HV // problem.HQ,
        BLOCK=BLOCK_V,
        L2NORM=problem.qk_l2norm,
        UPDATE=problem.update,
        PORTABLE=launch.portable(),
        num_warps=2,
        enable_fp_fusion=False,
    )
