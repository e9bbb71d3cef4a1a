"""Top-k routing in one kernel: choice, weights, renormalisation.

A score becomes an unsigned key in the order of float32, with NaN on top and -0 equal to 0. A choice
is the greatest key, then the lowest index that has it: two reductions of 32-bit integers, an
instruction each between the lanes of a warp. The key gives the score back, which a sum over the
lanes would cost five shuffles more.
"""

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from cutemoe.moe.routing import RouteProblem
from cutemoe.moe.tensors import RouteTensors
from cutemoe.triton_kernels import launch, numeric, pdl

if TYPE_CHECKING:
    from cutemoe.moe.plan import RouteConfig


@triton.jit
def ordered(score):
    """Sort keys uint32 of float32 scores, none of them 0; greater is better."""
    score = tl.where(score == 0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, ~bits, bits | -2147483648).to(tl.uint32, bitcast=True)
    return tl.where(score == score, key, 4294967295)


@triton.jit
def score_of(key):
    """The score of a key: 0 of -0, and a NaN of any."""
    bits = key.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits & 2147483647, ~bits).to(tl.float32, bitcast=True)


@triton.jit
def keys(score, index, inside):
    """Sort keys int64 of float32 scores, -1 outside; greater is better, then the lower index."""
    key = ordered(score).to(tl.int64)
    return tl.where(inside, (key << 10) | (1023 - index).to(tl.int64), -1)


@launch.entry
@triton.jit(do_not_specialize=["T"])
def route_tokens(
    logits_ptr,
    bias_ptr,
    ids_ptr,  # int32 [T, K]
    weights_ptr,  # float32 [T, K]
    stride_lt,
    T,
    E,
    scale,
    METHOD: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """Experts and weights of BLOCK_T tokens a program; cutemoe/moe/routing.py says the meaning."""
    pdl.results_of_the_last_kernel(PDL)
    tokens = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    index = tl.arange(0, BLOCK_E)[None, :]
    inside = (tokens < T)[:, None] & (index < E)
    at = tokens.to(tl.int64)[:, None] * stride_lt + index
    z = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if METHOD == "softmax_topk" or METHOD == "topk_softmax":
        score = z
        chosen_by = z
    else:
        score = numeric.sigmoid(z)
        chosen_by = z
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + index, mask=index < E, other=0.0).to(tl.float32)
            chosen_by = score + bias
        elif METHOD == "grouped_sigmoid":
            chosen_by = score
    if METHOD == "grouped_sigmoid":
        wide = keys(chosen_by, index, inside)
        inside = inside & _kept(wide, chosen_by, index, E, N_GROUP, TOPK_GROUP, BLOCK_T)
    # 0: not to be chosen any more
    key = tl.where(inside, ordered(chosen_by), 0)
    slot = tl.arange(0, BLOCK_K)[None, :]
    ids = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    value = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.max(key, 1)[:, None]
        at = tl.min(tl.where(key == best, index, BLOCK_E), 1)[:, None]
        hit = index == at
        key = tl.where(hit, 0, key)
        ids = tl.where(slot == k, at, ids)
        if bias_ptr is None:
            chosen = score_of(best)
        else:
            chosen = tl.sum(tl.where(hit, score, 0.0), 1)[:, None]
        value = tl.where(slot == k, chosen, value)
    live = slot < TOP_K
    if METHOD == "sigmoid" and bias_ptr is None:
        value = numeric.sigmoid(value)
    if METHOD == "softmax_topk":
        z = tl.where(index < E, z, float("-inf"))
        top = tl.max(z, 1)[:, None]
        total = tl.sum(numeric.exp(z - top), 1)[:, None]
        value = tl.div_rn(numeric.exp(value - top), tl.broadcast_to(total, (BLOCK_T, BLOCK_K)))
    elif METHOD == "topk_softmax":
        value = tl.where(live, value, float("-inf"))
        value = numeric.exp(value - tl.max(value, 1)[:, None])
        total = tl.sum(value, 1)[:, None]
        value = tl.div_rn(value, tl.broadcast_to(total, (BLOCK_T, BLOCK_K)))
    if RENORMALIZE and METHOD != "topk_softmax":
        total = tl.sum(tl.where(live, value, 0.0), 1)[:, None]
        total = tl.where(total == 0, 1.0, total)
        value = tl.div_rn(value, tl.broadcast_to(total, (BLOCK_T, BLOCK_K)))
    out = tokens.to(tl.int64)[:, None] * TOP_K + slot
    mask = (tokens < T)[:, None] & live
    tl.store(ids_ptr + out, ids, mask=mask)
    tl.store(weights_ptr + out, value * scale, mask=mask)


@triton.jit
def _kept(
    key,
    score,
    index,
    E,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Which experts belong to the TOPK_GROUP groups with the greatest sum of two best scores."""
    size = E // N_GROUP
    group = index // size
    GROUPS: tl.constexpr = triton.next_power_of_2(N_GROUP)
    groups = tl.arange(0, GROUPS)[None, :]
    sums = tl.zeros((BLOCK_T, GROUPS), tl.float32)
    for g in range(0, N_GROUP):
        own = tl.where(group == g, key, -1)
        total = tl.zeros((BLOCK_T,), tl.float32)
        for _ in tl.static_range(2):
            # a group of one has no second: -1 is no key, and nothing is added
            best = tl.max(own, 1)[:, None]
            hit = (own == best) & (best >= 0)
            total += tl.sum(tl.where(hit, score, 0.0), 1)
            own = tl.where(hit, -1, own)
        sums = tl.where(groups == g, total[:, None], sums)
    order = keys(sums, groups, groups < N_GROUP)
    kept = group < 0
    for _ in range(0, TOPK_GROUP):
        best = tl.max(order, 1)[:, None]
        order = tl.where(order == best, -1, order)
        kept = kept | (group == (1023 - (best & 1023)).to(tl.int32))
    return kept


def run(problem: RouteProblem, config: "RouteConfig", t: RouteTensors) -> None:
    """The Triton back end of `route`."""
    if problem.tokens == 0:
        return
    early = pdl.dependent(t.logits)
    route_tokens[(-(-problem.tokens // config.block_t),)](
        t.logits,
        t.bias,
        t.ids,
        t.weights,
        t.logits.stride(0),
        problem.tokens,
        problem.experts,
        float(problem.scale),
        METHOD=problem.method,
        RENORMALIZE=problem.renormalize,
        TOP_K=problem.top_k,
        N_GROUP=problem.n_group,
        TOPK_GROUP=problem.topk_group,
        BLOCK_T=config.block_t,
        BLOCK_E=max(16, config.block_e),
        BLOCK_K=launch.power_of_2(problem.top_k),
        PDL=early,
        **launch.options(config.warps, pdl=early),
    )
