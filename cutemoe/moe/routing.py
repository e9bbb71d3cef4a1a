"""Routing: which experts a token goes to, and with which weights; the problem and its meaning."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cutemoe.errors import invalid
from cutemoe.gemm.problem import check_rows
from cutemoe.moe.tensors import RouteTensors

METHODS = ("softmax_topk", "topk_softmax", "sigmoid", "grouped_sigmoid")
LOGITS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_TOP_K = 32
MAX_EXPERTS = 1024


@dataclass(frozen=True)
class RouteProblem:
    """A routing call without its tensors.

    Attributes:
        tokens, experts, top_k: T, E, K.
        method: one of METHODS.
        renormalize: divide the weights by their sum (no effect on topk_softmax).
        has_bias: a choice bias exists (sigmoid methods).
        n_group, topk_group: groups and groups kept, both 1 where the method has none.
        scale: multiplies the weights at the end.
        dtype: of the logits, "fp32", "bf16" or "fp16".
    """

    tokens: int
    experts: int
    top_k: int
    method: str
    renormalize: bool
    has_bias: bool
    n_group: int
    topk_group: int
    scale: float
    dtype: str

    @staticmethod
    def of(
        logits: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        top_k: int,
        method: str,
        renormalize: bool,
        n_group: int | None,
        topk_group: int | None,
        scale: float,
    ) -> RouteProblem:
        """Validates a call; raises InvalidCall naming the argument."""
        if logits.dtype not in LOGITS:
            raise invalid("logits", "float32, bfloat16 or float16", logits.dtype)
        if logits.ndim != 2 or not 1 <= logits.shape[1] <= MAX_EXPERTS:
            raise invalid("logits", f"shape [T, 1 to {MAX_EXPERTS}]", list(logits.shape))
        check_rows("logits", logits)
        experts = logits.shape[1]
        if not 1 <= top_k <= min(MAX_TOP_K, experts):
            raise invalid("top_k", f"1 to {min(MAX_TOP_K, experts)} of {experts} experts", top_k)
        if method not in METHODS:
            raise invalid("method", "one of " + ", ".join(map(repr, METHODS)), repr(method))
        _check_bias(bias, logits, method)
        groups = _check_groups(n_group, topk_group, experts, top_k, method)
        return RouteProblem(
            tokens=logits.shape[0],
            experts=experts,
            top_k=top_k,
            method=method,
            renormalize=renormalize,
            has_bias=bias is not None,
            n_group=groups[0],
            topk_group=groups[1],
            scale=scale,
            dtype=LOGITS[logits.dtype],
        )


def _check_bias(bias: torch.Tensor | None, logits: torch.Tensor, method: str) -> None:
    if bias is None:
        return
    if method not in ("sigmoid", "grouped_sigmoid"):
        fix = "add a router bias to the logits"
        raise invalid("bias", f"None for method={method!r}", "a tensor", fix)
    if not bias.dtype.is_floating_point:
        raise invalid("bias", "a floating point tensor", bias.dtype)
    if tuple(bias.shape) != (logits.shape[1],) or not bias.is_contiguous():
        raise invalid("bias", f"a contiguous tensor [{logits.shape[1]}]", list(bias.shape))
    if bias.device != logits.device:
        raise invalid("bias", f"the device of logits, {logits.device}", bias.device)


def _check_groups(
    n_group: int | None, topk_group: int | None, experts: int, top_k: int, method: str
) -> tuple[int, int]:
    given = (("n_group", n_group), ("topk_group", topk_group))
    if method != "grouped_sigmoid":
        for name, value in given:
            if value is not None:
                raise invalid(name, f"None for method={method!r}", value)
        return 1, 1
    if n_group is None or n_group < 1 or experts % n_group:
        raise invalid("n_group", f"a divisor of {experts} experts", n_group)
    if topk_group is None or not 1 <= topk_group <= n_group:
        raise invalid("topk_group", f"1 to n_group = {n_group}", topk_group)
    if topk_group * (experts // n_group) < top_k:
        want = f"enough groups of {experts // n_group} experts for top_k = {top_k}"
        raise invalid("topk_group", want, topk_group)
    return n_group, topk_group


def run(problem: RouteProblem, config: None, t: RouteTensors) -> None:
    """The torch back end."""
    ids, weights = route_reference(problem, t.logits, t.bias)
    t.ids.copy_(ids)
    t.weights.copy_(weights)


def route_reference(
    problem: RouteProblem, logits: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights of every token: ids int64 [T, K], weights float32 [T, K].

    The order of the slots is that of the choice, best first. NaN is the greatest value, as in
    torch.sort, so a NaN logit is chosen first and shows in the weights. -0 equals 0.

    - softmax_topk: chooses by the logits; weight = softmax over all experts.
    - topk_softmax: chooses by the logits; weight = softmax over the chosen.
    - sigmoid: chooses by sigmoid(logit) + bias, without bias by the logits; weight = sigmoid.
    - grouped_sigmoid: the score of a group is the sum of its two best sigmoid(logit) + bias; the
      topk_group best groups stay, and the choice is as in sigmoid among their experts.
    """
    z = logits.to(torch.float32)
    if problem.method in ("softmax_topk", "topk_softmax"):
        ids = _order(z)[:, : problem.top_k]
        if problem.method == "softmax_topk":
            weights = _renormalized(torch.softmax(z, -1).gather(1, ids), problem.renormalize)
        else:
            weights = torch.softmax(z.gather(1, ids), -1)
        return ids, weights * problem.scale
    # in float64, because torch's float32 sigmoid differs between the body and the tail of a vector,
    # and equal logits must stay equal
    score = torch.sigmoid(z.to(torch.float64)).to(torch.float32)
    biased = score if bias is None else score + bias.to(torch.float32)
    if problem.method == "grouped_sigmoid":
        order = _order(biased)
        excluded = _excluded(biased, problem.n_group, problem.topk_group).gather(1, order)
        # stable: the kept experts move to the front in their order
        order = order.gather(1, excluded.to(torch.uint8).sort(dim=1, stable=True).indices)
    else:
        order = _order(z if bias is None else biased)
    ids = order[:, : problem.top_k]
    return ids, _renormalized(score.gather(1, ids), problem.renormalize) * problem.scale


def _order(key: torch.Tensor) -> torch.Tensor:
    """Indices of the last dimension, greatest first, ties by the lower index."""
    return key.sort(dim=-1, descending=True, stable=True).indices


def _excluded(biased: torch.Tensor, n_group: int, topk_group: int) -> torch.Tensor:
    """Which experts are not in the topk_group best groups; bool [T, E]."""
    grouped = biased.unflatten(1, (n_group, -1))
    best = grouped.sort(dim=-1, descending=True, stable=True).values[..., :2].sum(-1)
    kept = _order(best)[:, :topk_group]
    excluded = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
    return excluded.repeat_interleave(grouped.shape[-1], dim=1)


def _renormalized(weights: torch.Tensor, renormalize: bool) -> torch.Tensor:
    """weights / their sum; a zero sum leaves zeros."""
    if not renormalize:
        return weights
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1.0, total)
