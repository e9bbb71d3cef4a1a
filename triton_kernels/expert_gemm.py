"""The mixed-input GEMM of both MoE layers and of `grouped_gemm`: weights times gathered rows.

One program computes `block_n` outputs of up to `block_m` rows that share an expert. Weights are the
left operand: they are decoded in registers and stay there for the tensor core, so few rows waste
no MMA rows (m16n8k16 at 8 rows, wgmma with A in registers from 16 on).

    grid      tile-major: program = tile * blocks of outputs + block
    tiles     (expert, first row, rows) written on the device by sort.py; programs beyond exit
    per step  load codes, scales and x (cp.async, `stages` deep), decode, one dot

Where scales meet the sums: mxfp4 and nvfp4 in bf16, and nvfp4 in fp16, scale the weight before the
dot, exactly; int4, and mxfp4 in fp16 where scaled weights would not fit, scale partial sums.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from cutemoe.triton_kernels import decode, epilogue, launch, numeric


@dataclass(frozen=True)
class Spec:
    """What the kernel is compiled for.

    Attributes:
        weight: "dense", "mxfp4", "nvfp4" or "int4"; group: values per scale, 0 if dense.
        packed: layout sm80_w4, else rows.
        fp16: operands of the tensor core are fp16, else bf16.
        divide: slots a token where x is gathered: x row = slot // divide; 0: x is in sorted order.
        scatter: output rows are in slot order, else sorted.
        token_scale, expert_scale, factor: multipliers of the sums: float32 by x row, and two by
            expert.
        bias: float32 [E, outputs of w] is added.
        activation: "none", "swiglu", "silu" (swiglu of alpha 1, eager only), "geglu", "geglu_tanh"
            or "relu2".
        order: rows of gate and up, "gate_up", "up_gate" or "interleaved".
        alpha_e, beta_e, limit_e: the parameter is a pointer [E], else a number; limit: it exists.
        eager: sums, and what every operation on them gives, are rounded to the type of x.
        zero_tail: tiles of a negative expert write zeros.
        min_step: columns of the narrowest block of K in layout sm80_w4; 32 where 128 divides K.
        block_m, block_n, block_k, stages: rows, outputs (of w), K step, pipeline depth.
        wide: 64-bit offsets of rows.
        portable: no PTX.
    """

    weight: str
    group: int
    packed: bool
    fp16: bool
    divide: int
    scatter: bool
    token_scale: bool
    expert_scale: bool
    factor: bool
    bias: bool
    activation: str
    order: str
    alpha_e: bool
    beta_e: bool
    limit_e: bool
    limit: bool
    eager: bool
    zero_tail: bool
    min_step: int
    block_m: int
    block_n: int
    block_k: int
    stages: int
    wide: bool
    portable: bool

    @property
    def gated(self) -> bool:
        """Two rows of w make an output."""
        return self.activation in ("swiglu", "silu", "geglu", "geglu_tanh")

    @property
    def outputs(self) -> int:
        """Outputs of one program."""
        return self.block_n // 2 if self.gated else self.block_n

    @property
    def after(self) -> bool:
        """Scales multiply partial sums."""
        return self.weight == "int4" or (self.weight == "mxfp4" and self.fp16)

    @property
    def parts(self) -> int:
        """Dots a step: one for each scale where scales multiply sums."""
        return max(1, 128 // self.group) if self.packed and self.after else 1

    @property
    def planes(self) -> int:
        """Rows of scale words a block in layout sm80_w4."""
        return self.parts if self.weight == "int4" else 1

    @property
    def words(self) -> int:
        """Scale words a row and block in layout sm80_w4."""
        return 2 if self.weight == "nvfp4" else 1


@launch.entry
@triton.jit
def expert_gemm(
    x_ptr,  # [rows of x, K] bf16 or fp16
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    factor_ptr,
    expert_scale_ptr,
    bias_ptr,
    slots_ptr,  # int32 [R], slot of every sorted row
    tiles_ptr,  # int32 [.., 3]
    count_ptr,  # int32 [1]
    out_ptr,
    alpha,
    beta,
    limit,
    K,
    N,  # rows of w
    stride_xm,
    stride_om,
    spec: tl.constexpr,
):
    """out[row, j] = activation(sum over k of w[expert, .., k] * x[row, k] * scales + bias)."""
    OUT: tl.constexpr = spec.outputs
    BM: tl.constexpr = spec.block_m
    n_out = N // 2 if spec.gated else N
    blocks = tl.cdiv(n_out, spec.outputs)
    pid = tl.program_id(0)
    tile = pid // blocks
    j0 = (pid % blocks) * spec.outputs
    # all at once: a load that waits for another costs 0.6 us
    count = tl.load(count_ptr)
    expert = tl.load(tiles_ptr + 3 * tile)
    first = tl.load(tiles_ptr + 3 * tile + 1)
    end = first + tl.load(tiles_ptr + 3 * tile + 2)
    if tile >= count:
        return
    rows = first + tl.arange(0, spec.block_m)
    offs_j = j0 + tl.arange(0, spec.outputs)
    if spec.zero_tail:
        if expert < 0:
            at = rows.to(tl.int64)[None, :] * stride_om + offs_j[:, None]
            zeros = tl.zeros((OUT, BM), out_ptr.dtype.element_ty)
            tl.store(out_ptr + at, zeros, mask=(rows < end)[None, :] & (offs_j < n_out)[:, None])
            return
    valid = rows < end
    slots = rows
    if spec.divide > 0 or spec.scatter:
        slots = tl.load(slots_ptr + rows, mask=valid, other=0)
    x_rows = slots // spec.divide if spec.divide > 0 else rows
    x_offs = _offset(x_rows.to(tl.int64) * stride_xm, spec)
    offs_n = epilogue.weight_rows(j0, N, spec)
    e = expert.to(tl.int64)
    if spec.packed:
        acc = _packed(x_ptr, x_offs, w_ptr, w_scale_ptr, e, offs_n, valid, K, N, spec)
    elif spec.weight == "dense":
        acc = _dense(x_ptr, x_offs, w_ptr, e, offs_n, valid, K, N, spec)
    else:
        acc = _rows(x_ptr, x_offs, w_ptr, w_scale_ptr, e, offs_n, valid, K, N, spec)
    acc = epilogue.scaled(
        acc, x_scale_ptr, factor_ptr, expert_scale_ptr, expert, x_rows, valid, spec
    )
    value = epilogue.activated(acc, bias_ptr, alpha, beta, limit, expert, offs_j, n_out, spec)
    out_rows = slots if spec.scatter else rows
    at = out_rows.to(tl.int64)[None, :] * stride_om + offs_j[:, None]
    mask = valid[None, :] & (offs_j < n_out)[:, None]
    value = decode.rounded(value, out_ptr.dtype.element_ty, spec.portable)
    tl.store(out_ptr + at, value, mask=mask)


@triton.jit
def _dot(a, x, acc, spec: tl.constexpr):
    """acc + a @ x with float32 sums; the interpreter multiplies no bf16."""
    if spec.portable:
        return tl.dot(decode.widened(a), decode.widened(x), acc, input_precision="ieee")
    else:
        return tl.dot(a, x, acc)


@triton.jit
def _offset(o, spec: tl.constexpr):
    """int64 offsets, in 32 bits where those suffice: at 128 rows a tenth of the main loop less."""
    if spec.wide:
        return o
    else:
        return o.to(tl.int32)


@triton.jit
def _packed(x_ptr, x_offs, w_ptr, s_ptr, e, offs_n, valid, K, N, spec: tl.constexpr):
    """Layout sm80_w4: sums float32 [block_n, block_m]."""
    tl.assume(K >= 16)
    n_pad = tl.cdiv(N, 8) * 8
    blocks = K // 128 + ((K >> 6) & 1) + ((K >> 5) & 1) + ((K >> 4) & 1)
    tl.assume(blocks > 0)
    PARTS: tl.constexpr = spec.parts
    WIDTH: tl.constexpr = 128 // PARTS
    MIN_STEP: tl.constexpr = spec.min_step
    WORDS: tl.constexpr = spec.words
    cols = tl.arange(0, 32)
    offs_k = tl.arange(0, WIDTH)
    # pointers to the block, the same for all; rows only have offsets
    w_ptr += e * (n_pad * (K // 4))
    s_ptr += e * (blocks * spec.planes * n_pad * WORDS)
    w_offs = _offset((offs_n // 8).to(tl.int64) * (2 * K), spec)
    low = offs_n % 8
    plane = n_pad.to(tl.int64)
    BN: tl.constexpr = spec.block_n
    BM: tl.constexpr = spec.block_m
    zeros = tl.zeros((BN, BM), tl.float32)
    acc = zeros
    rest = K
    for b in tl.range(0, blocks, num_stages=spec.stages):
        if MIN_STEP == 32:
            step = 32
            w = tl.load(w_ptr + (w_offs + low * 32)[:, None] + cols[None, :])
        else:
            step = tl.where(rest >= 64, 16, tl.where(rest >= 32, 8, 4))
            step = tl.multiple_of(tl.where(rest >= 128, 32, step), MIN_STEP)
            at = (w_offs + low * step)[:, None] + cols[None, :]
            w = tl.load(w_ptr + at, mask=(cols < step)[None, :], other=0)
        if spec.after:
            w0, w1, w2, w3 = _codes(w, spec)
            if spec.weight == "mxfp4":
                word = tl.load(s_ptr + offs_n)
                s_ptr += plane
        else:
            at = (offs_n * WORDS)[:, None] + tl.arange(0, WORDS)[None, :]
            w0, w1, w2, w3 = _scaled_codes(w, tl.load(s_ptr + at), spec)
            s_ptr += plane * WORDS
        for p in tl.static_range(PARTS):
            if MIN_STEP == 32:
                at = x_offs[None, :] + offs_k[:, None]
                x = tl.load(x_ptr + p * WIDTH + at, mask=valid[None, :], other=0.0)
            else:
                k = (p * (WIDTH // 32) + offs_k // 32) * step + offs_k % 32
                inside = (offs_k % 32 < step)[:, None] & valid[None, :]
                x = tl.load(x_ptr + x_offs[None, :] + k[:, None], mask=inside, other=0.0)
            a = _part(w0, w1, w2, w3, p, PARTS)
            if not spec.after:
                acc = _dot(a, x, acc, spec)
            elif spec.weight == "mxfp4":
                acc += _dot(a, x, zeros, spec) * decode.e8m0_scale(word, p)[:, None]
            else:
                scale = tl.load(s_ptr + (b * PARTS + p) * plane + offs_n)
                acc += _dot(a, x, zeros, spec) * scale[:, None]
        w_ptr += 8 * step
        x_ptr += 4 * step
        rest -= 4 * step
    return acc


@triton.jit
def _part(w0, w1, w2, w3, PART: tl.constexpr, PARTS: tl.constexpr):
    """The columns of one dot: all four tensors, two, or one."""
    if PARTS == 1:
        return decode.four_beside(w0, w1, w2, w3)
    elif PARTS == 2:
        if PART == 0:
            return decode.beside(w0, w1)
        else:
            return decode.beside(w2, w3)
    elif PART == 0:
        return w0
    elif PART == 1:
        return w1
    elif PART == 2:
        return w2
    else:
        return w3


@triton.jit
def _codes(w, spec: tl.constexpr):
    """Half-words [block_n, 32] -> four tensors of codes; those of fp16 e2m1 times 2^-14."""
    if spec.weight == "int4":
        return decode.int4_codes(w, spec.fp16, spec.portable)
    else:
        return decode.e2m1_fp16(w, spec.portable)


@triton.jit
def _scaled_codes(w, s, spec: tl.constexpr):
    """Half-words [block_n, 32] and scale words [block_n, words] -> four tensors of values."""
    NVFP4: tl.constexpr = spec.weight == "nvfp4"
    s0 = decode.spread(decode.word_scales(s, 0, NVFP4, spec.fp16), spec.block_n, spec.words, 32)
    s1 = decode.spread(decode.word_scales(s, 1, NVFP4, spec.fp16), spec.block_n, spec.words, 32)
    s2 = decode.spread(decode.word_scales(s, 2, NVFP4, spec.fp16), spec.block_n, spec.words, 32)
    s3 = decode.spread(decode.word_scales(s, 3, NVFP4, spec.fp16), spec.block_n, spec.words, 32)
    return decode.e2m1_scaled(w, s0, s1, s2, s3, spec.fp16, spec.portable)


@triton.jit
def _dense(x_ptr, x_offs, w_ptr, e, offs_n, valid, K, N, spec: tl.constexpr):
    """Weights [E, N, K] of the type of x: sums float32 [block_n, block_m]."""
    offs_k = tl.arange(0, spec.block_k)
    w_ptr += e * N * K
    w_offs = _offset(offs_n.to(tl.int64) * K, spec)
    BN: tl.constexpr = spec.block_n
    BM: tl.constexpr = spec.block_m
    zeros = tl.zeros((BN, BM), tl.float32)
    acc = zeros
    for k0 in tl.range(0, K, spec.block_k, num_stages=spec.stages):
        inside = offs_k < K - k0
        w = tl.load(w_ptr + w_offs[:, None] + offs_k[None, :], mask=inside[None, :], other=0.0)
        at = x_offs[None, :] + offs_k[:, None]
        x = tl.load(x_ptr + at, mask=inside[:, None] & valid[None, :], other=0.0)
        acc = _dot(w, x, acc, spec)
        w_ptr += spec.block_k
        x_ptr += spec.block_k
    return acc


@triton.jit
def _rows(x_ptr, x_offs, w_ptr, s_ptr, e, offs_n, valid, K, N, spec: tl.constexpr):
    """Bytes as in the checkpoint, two dots a step for even and odd k, scales on the sums.

    nvfp4 has two groups a step and scales the weight instead, which is exact.
    """
    WIDTH: tl.constexpr = 32 if spec.group < 32 else spec.group
    GROUPS: tl.constexpr = WIDTH // spec.group
    INT4: tl.constexpr = spec.weight == "int4"
    bytes_ = tl.arange(0, WIDTH // 2)
    offs_k = tl.arange(0, WIDTH)
    group = tl.arange(0, GROUPS)
    w_rows = w_ptr + e * N * (K // 2) + offs_n.to(tl.int64) * (K // 2)
    s_rows = s_ptr + e * N * (K // spec.group) + offs_n.to(tl.int64) * (K // spec.group)
    BN: tl.constexpr = spec.block_n
    BM: tl.constexpr = spec.block_m
    zeros = tl.zeros((BN, BM), tl.float32)
    acc = zeros
    for k0 in tl.range(0, K, WIDTH, num_stages=spec.stages):
        at = k0 // 2 + bytes_
        w = tl.load(w_rows[:, None] + at[None, :], mask=(at < K // 2)[None, :], other=0)
        inside = (k0 + offs_k < K)[None, :] & valid[:, None]
        x = tl.load(x_ptr + x_offs[:, None] + (k0 + offs_k)[None, :], mask=inside, other=0.0)
        HALF: tl.constexpr = WIDTH // 2
        even, odd = tl.split(tl.reshape(x, (BM, HALF, 2)))
        code = w.to(tl.int32)
        low = decode.nibble_value(code & 15, INT4)
        high = decode.nibble_value(code >> 4, INT4)
        if spec.weight == "nvfp4":
            at = k0 // spec.group + group
            s = tl.load(s_rows[:, None] + at[None, :], mask=(at * spec.group < K)[None, :], other=0)
            s = decode.spread(numeric.decode_e4m3(s), spec.block_n, GROUPS, WIDTH // 2)
            low *= s
            high *= s
        part = _dot(decode.float16_of(low, spec.fp16), tl.trans(even), zeros, spec)
        part = _dot(decode.float16_of(high, spec.fp16), tl.trans(odd), part, spec)
        if spec.weight == "nvfp4":
            acc += part
        else:
            s = tl.load(s_rows + k0 // spec.group)
            if spec.weight == "mxfp4":
                s = decode.e8m0_value(s.to(tl.int32))
            acc += part * s.to(tl.float32)[:, None]
    return acc
