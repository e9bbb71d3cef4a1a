"""What happens to the float32 sums of `expert_gemm`: multipliers, bias, activation."""

import triton
import triton.language as tl

from cutemoe.triton_kernels import decode, numeric


@triton.jit
def weight_rows(j0, N, spec: tl.constexpr):
    """Rows of w behind the sums of one program; int32 [block_n], all below N.

    Gated programs hold the gate and up rows of output j at distance 8, where one thread owns both
    in the layout of tensor core sums: rows 16q .. 16q+7 are gates, 16q+8 .. 16q+15 their ups.
    """
    r = tl.arange(0, spec.block_n)
    if spec.gated:
        n_out = N // 2
        j = tl.minimum(j0 + (r // 16) * 8 + r % 8, n_out - 1)
        up = (r // 8) % 2
        if spec.order == "gate_up":
            return j + up * n_out
        elif spec.order == "up_gate":
            return j + (1 - up) * n_out
        else:
            return 2 * j + up
    else:
        return tl.minimum(j0 + r, N - 1)


@triton.jit
def scaled(
    acc,
    token_scale_ptr,
    factor_ptr,
    expert_scale_ptr,
    expert,
    x_rows,
    valid,
    spec: tl.constexpr,
):
    """Sums [block_n, block_m] times what the layout, the expert and the row of x left to do."""
    if spec.packed and spec.weight == "nvfp4":
        acc *= 128.0
    if spec.factor:
        acc *= tl.load(factor_ptr + expert)
    if spec.token_scale:
        acc *= tl.load(token_scale_ptr + x_rows, mask=valid, other=0.0)[None, :]
    if spec.expert_scale:
        acc *= tl.load(expert_scale_ptr + expert)
    return acc


@triton.jit
def stored(x, spec: tl.constexpr):
    """float32 as the next operation reads it: where eager, rounded to the type of x."""
    if not spec.eager:
        return x
    elif spec.fp16:
        return decode.rounded(x, tl.float16, spec.portable).to(tl.float32)
    else:
        return decode.widened(decode.rounded(x, tl.bfloat16, spec.portable))


@triton.jit
def activated(acc, bias_ptr, alpha, beta, limit, expert, offs_j, n_out, spec: tl.constexpr):
    """Sums [block_n, block_m] -> outputs float32 [outputs, block_m] with bias and activation."""
    inside = offs_j < n_out
    acc = stored(acc, spec)
    if not spec.gated:
        if spec.bias:
            at = bias_ptr + expert.to(tl.int64) * n_out + offs_j
            bias = stored(tl.load(at, mask=inside, other=0.0), spec)
            acc = stored(acc + bias[:, None], spec)
        if spec.activation == "relu2":
            acc = tl.where(acc < 0, 0.0, acc)
            acc = stored(acc * acc, spec)
        return acc
    else:
        QUADS: tl.constexpr = spec.block_n // 16
        BM: tl.constexpr = spec.block_m
        OUT: tl.constexpr = spec.outputs
        pairs = tl.reshape(acc, (QUADS, 2, 8, BM))
        pairs = tl.permute(pairs, (0, 2, 3, 1))
        gate, up = tl.split(tl.reshape(pairs, (OUT, BM, 2)))
        if spec.bias:
            row = bias_ptr + expert.to(tl.int64) * (2 * n_out)
            if spec.order == "gate_up":
                of_gate, of_up = row + offs_j, row + n_out + offs_j
            elif spec.order == "up_gate":
                of_gate, of_up = row + n_out + offs_j, row + offs_j
            else:
                of_gate, of_up = row + 2 * offs_j, row + 2 * offs_j + 1
            b_gate = stored(tl.load(of_gate, mask=inside, other=0.0), spec)
            b_up = stored(tl.load(of_up, mask=inside, other=0.0), spec)
            gate = stored(gate + b_gate[:, None], spec)
            up = stored(up + b_up[:, None], spec)
        if spec.activation == "swiglu" or spec.activation == "silu":
            return _swiglu(gate, up, alpha, beta, limit, expert, spec)
        else:
            glu = _gelu(gate, spec.activation == "geglu_tanh", spec.eager)
            return stored(stored(glu, spec) * up, spec)


@triton.jit
def _swiglu(gate, up, alpha, beta, limit, expert, spec: tl.constexpr):
    if spec.alpha_e:
        alpha = tl.load(alpha + expert)
    if spec.beta_e:
        beta = tl.load(beta + expert)
    if spec.limit:
        if spec.limit_e:
            limit = tl.load(limit + expert)
        if spec.eager:
            # a tensor: the interpreter passes numbers as floats of Python
            limit = stored(limit + tl.zeros_like(gate), spec)
        # comparisons, not minimum: NaN must stay NaN
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, up)
        up = tl.where(up < -limit, -limit, up)
    if spec.eager:
        if spec.activation == "silu":
            glu = tl.div_rn(gate, 1.0 + numeric.library_exp(-gate, spec.portable))
        else:
            x = stored(alpha * gate, spec)
            one = 1.0 + tl.zeros_like(x)
            e = numeric.library_exp(-x, spec.portable)
            glu = gate * stored(tl.div_rn(one, one + e), spec)
        return stored(stored(glu, spec) * stored(up + beta, spec), spec)
    else:
        return gate * (1.0 / (1.0 + tl.exp(-(alpha * gate)))) * (up + beta)


@triton.jit
def _gelu(x, TANH: tl.constexpr, EAGER: tl.constexpr):
    if TANH and EAGER:
        # torch's own cancellation: tanh rounds to multiples of 2^-24 near -1
        u = 0.7978845608028654 * (x + 0.044715 * (x * x * x))
        return 0.5 * x * (1.0 + (2.0 * numeric.sigmoid(2.0 * u) - 1.0))
    elif TANH:
        # (1 + tanh(u)) / 2 = sigmoid(2u), without cancellation
        u = 0.7978845608028654 * (x + 0.044715 * (x * x * x))
        return x * (1.0 / (1.0 + tl.exp(-2.0 * u)))
    else:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
