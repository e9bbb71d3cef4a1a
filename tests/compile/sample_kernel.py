"""A kernel for the tests of the harness itself."""

import triton
import triton.language as tl


@triton.jit
def halve(x):
    return x * 0.5


@triton.jit
def dot(
    a_ptr,
    b_ptr,
    c_ptr,
    K,
    stride,
    change: tl.constexpr,
    BLOCK: tl.constexpr,
    SIDE: tl.constexpr = 64,  # pyright: ignore[reportArgumentType]
):
    offs = tl.arange(0, SIDE)
    k = tl.arange(0, BLOCK)
    acc = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(0, K, BLOCK):
        a = tl.load(a_ptr + offs[:, None] * stride + start + k[None, :])
        b = tl.load(b_ptr + offs[None, :] * stride + start + k[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(c_ptr + offs[:, None] * SIDE + offs[None, :], change(acc))
