"""The weighted sum over the slots of a token: fixed order, float32, one rounding.

Products with weights of 16 bits are rounded to their type before the sum, as torch's are. In
torch's order, which is that of its sum over a dimension that is not the last on a GPU, slots
i, i + 4, .. are added up for i = 0 .. 3, and then these four sums.
"""

import torch
import triton
import triton.language as tl

from cutemoe.triton_kernels import decode, launch


@launch.entry
@triton.jit
def combine_slots(
    y_ptr,  # float32 [T * K, H]
    ids_ptr,
    weights_ptr,
    out_ptr,
    H,
    stride_it,
    stride_wt,
    stride_ot,
    expert_offset,
    E,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PORTABLE: tl.constexpr,
):
    """out[t] = sum over slots of weight * y; skipped slots are not read.

    One program a token and block of BLOCK outputs; slots i, i + PARTS, .. first.
    """
    blocks = tl.cdiv(H, BLOCK)
    pid = tl.program_id(0)
    t = (pid // blocks).to(tl.int64)
    offs = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(PARTS):
        acc = tl.zeros((BLOCK,), tl.float32)
        for k in tl.static_range(i, TOP_K, PARTS):
            expert = tl.load(ids_ptr + t * stride_it + k)
            live = (expert >= expert_offset) & (expert < expert_offset + E)
            weight = tl.load(weights_ptr + t * stride_wt + k, mask=live, other=0.0)
            row = y_ptr + (t * TOP_K + k) * H
            y = tl.load(row + offs, mask=tl.where(live, offs, H) < H, other=0.0)
            if tl.float32 == weights_ptr.dtype.element_ty:
                product = weight * y
            else:
                product = decode.widened(weight) * y
                product = decode.rounded(product, weights_ptr.dtype.element_ty, PORTABLE)
                product = decode.widened(product)
            acc += tl.where(live, product, 0.0)
        total += acc
    value = decode.rounded(total, out_ptr.dtype.element_ty, PORTABLE)
    tl.store(out_ptr + t * stride_ot + offs, value, mask=offs < H)


def combine(
    y: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    experts: int,
    expert_offset: int,
    *,
    fused: bool = True,
) -> None:
    """out [T, H] from y float32 [T * K, H] in slot order, ids and weights [T, K].

    Args:
        fused: a product may go into the sum unrounded; otherwise sums are in torch's order.
    """
    tokens, hidden = out.shape
    # all slots of a block are in flight together
    most = 8192 // launch.power_of_2(max(8, ids.shape[1]))
    block = min(512 if tokens <= 32 else 1024, most, max(16, launch.power_of_2(hidden)))
    combine_slots[(tokens * -(-hidden // block),)](
        y,
        ids,
        weights,
        out,
        hidden,
        ids.stride(0),
        weights.stride(0),
        out.stride(0),
        expert_offset,
        experts,
        TOP_K=ids.shape[1],
        BLOCK=block,
        PARTS=1 if fused else 4,
        PORTABLE=launch.portable(),
        # 4096 tokens of 6 slots of 4096, H200, 2026-11-30: 4 warps 107 us, 8 101, 16 104
        **launch.options(8 if block == 1024 else 4, fusion=fused),
    )
