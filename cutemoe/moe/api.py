"""The public MoE functions: routing and the fused expert layer."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch

from cutemoe.errors import invalid
from cutemoe.gemm.api import check_inference_tensor
from cutemoe.moe import operator
from cutemoe.moe.activation import Activation, SwiGLU, kind
from cutemoe.moe.plan import BACKENDS, ROUTE_BACKENDS
from cutemoe.moe.prepare import PreparedMoE, prepare_moe
from cutemoe.moe.problem import Problem
from cutemoe.moe.routing import RouteProblem
from cutemoe.moe.tensors import MoETensors
from cutemoe.moe.workspace import Workspace
from cutemoe.runtime.capture import distinct
from cutemoe.runtime.op import Op
from cutemoe.runtime.recall import Recall, again
from cutemoe.runtime.replay import Again

__all__ = ["FUSED_MOE", "ROUTE", "fused_moe", "prepare_moe", "route"]

_KNOWN, _ROUTED = Recall(), Recall()


def route(
    logits: torch.Tensor,
    top_k: int,
    *,
    method: str = "softmax_topk",
    renormalize: bool = True,
    bias: torch.Tensor | None = None,
    n_group: int | None = None,
    topk_group: int | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses top_k experts for every token and their weights, in float32.

    The order of the slots is that of the choice, best first, equal values by the lower index. NaN
    counts as the greatest value, as in torch.sort: ids are always distinct and in [0, E), and a NaN
    logit that matters gives NaN weights for its token.

    Args:
        logits: [T, E], float32, bf16 or fp16; E up to 1024. Rows may have any stride.
        top_k: 1 to 32, at most E.
        method: "softmax_topk" (softmax over all experts, then choose), "topk_softmax" (choose, then
            softmax over the chosen: gpt-oss), "sigmoid", or "grouped_sigmoid" (DeepSeek-V3: keep
            the topk_group groups with the greatest sums of two best scores, choose among them).
            The softmax methods, and sigmoid without bias, choose by the logits themselves.
        renormalize: divide the weights by their sum where it is not 0.
        bias: [E] floating point, sigmoid methods only: added to the scores for the choice,
            not in the weights.
        n_group, topk_group: grouped_sigmoid only: E / n_group neighbours are a group.
        scale: multiplies the weights at the end.
        backend: "auto", "triton" or "reference".

    Returns:
        ids int32 [T, K] and weights float32 [T, K].

    Raises:
        InvalidCall: a malformed argument.
        Unsupported: no back end runs this here; the message has every reason.

    >>> ids, weights = route(torch.tensor([[0.0, 4.0, 1.0, 4.0]]), 2, method="topk_softmax")
    >>> ids.tolist(), weights.tolist()
    ([[1, 3]], [[0.5, 0.5]])
    """
    words, tensors = (), []
    if not torch.compiler.is_compiling():
        words = (
            getattr(logits, "shape", None), top_k, type(top_k), method, renormalize,
            type(renormalize), n_group, topk_group, type(n_group), type(topk_group), scale,
            type(scale), backend, bias is None,
        )  # fmt: skip
        tensors = [logits] if bias is None else [logits, bias]
        if found := _ROUTED.find(words, tensors):
            launch, addresses = found
            ids, weights = operator.route_results(logits, top_k)
            launch([*tensors, ids, weights], [*addresses, ids.data_ptr(), weights.data_ptr()])
            return ids, weights
    _check_route(logits, top_k, method, renormalize, bias, n_group, topk_group, scale, backend)
    call = (logits, bias, top_k, method, renormalize, n_group, topk_group, float(scale), backend)
    results = operator.route(*call)
    if words:
        _ROUTED.keep(words, tensors, lambda: operator.bind_route(*call)[0])
    return results


def _check_route(
    logits: Any,
    top_k: Any,
    method: Any,
    renormalize: Any,
    bias: Any,
    n_group: Any,
    topk_group: Any,
    scale: Any,
    backend: Any,
) -> None:
    """Raises InvalidCall for what the schema of the operator would answer with a TypeError."""
    check_inference_tensor("logits", logits)
    if bias is not None:
        check_inference_tensor("bias", bias)
    _check_type("top_k", top_k, int, "an integer")
    _check_type("method", method, str, "a name")
    _check_type("renormalize", renormalize, bool, "True or False")
    for name, value in (("n_group", n_group), ("topk_group", topk_group)):
        if value is not None:
            _check_type(name, value, int, "an integer")
    if not isinstance(scale, (int, float)) or isinstance(scale, bool):
        raise invalid("scale", "a number", repr(scale))
    _check_type("backend", backend, str, "a name")


def _check_type(name: str, value: object, wanted: type, expected: str) -> None:
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise invalid(name, expected, repr(value))


def _describe_route(
    logits: torch.Tensor,
    top_k: int,
    *,
    method: str = "softmax_topk",
    renormalize: bool = True,
    bias: torch.Tensor | None = None,
    n_group: int | None = None,
    topk_group: int | None = None,
    scale: float = 1.0,
    backend: str = "auto",
) -> tuple[RouteProblem, torch.device, str]:
    _check_route(logits, top_k, method, renormalize, bias, n_group, topk_group, scale, backend)
    problem, _ = operator.route_call(
        logits, bias, top_k, method, renormalize, n_group, topk_group, float(scale)
    )
    return problem, logits.device, backend


def _bind_route(
    logits: torch.Tensor, top_k: int, **options: Any
) -> tuple[Again | None, list[torch.Tensor], Any]:
    given = inspect.signature(route).bind(logits, top_k, **options)
    given.apply_defaults()
    o = given.arguments
    names = ("top_k", "method", "renormalize", "bias", "n_group", "topk_group", "scale", "backend")
    _check_route(logits, *[o[name] for name in names])
    routes, tensors = operator.bind_route(
        logits, o["bias"], *[o[name] for name in names[:3]], o["n_group"], o["topk_group"],
        float(o["scale"]), o["backend"],
    )  # fmt: skip
    return routes, tensors, tuple(tensors[-2:])


ROUTE = Op("route", ROUTE_BACKENDS, _describe_route, _bind_route)


def fused_moe(
    x: torch.Tensor,
    moe: PreparedMoE,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    activation: Activation = SwiGLU(),  # noqa: B008  (frozen)
    expert_offset: int = 0,
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
    deterministic: bool = True,
    rounding: str = "fused",
    backend: str = "auto",
) -> torch.Tensor:
    """Runs every token through its experts and adds the weighted results.

    y[t] = sum over slots k of weights[t, k] * expert(ids[t, k], x[t]), where an expert is
    activation(x @ w13.T + b13) @ w2.T + b2. Sums, biases, activation and combine are float32, with
    one rounding of the activation to moe.activations and one to the dtype of x.

    Args:
        x: [T, H] bf16 or fp16, the dtype of moe.activations where that is one of them. Rows may
            have any stride.
        moe: `prepare_moe`'s result, on the device of x.
        ids: [T, K] int32 or int64. A slot whose id is outside [expert_offset, expert_offset + E) is
            skipped, whatever its weight; a token with no other slots gives a zero row.
        weights: [T, K] float32; with rounding "eager" the dtype of x as well.
        activation: SwiGLU or GeGLU for gated layers, ReLU2 for ungated ones.
        expert_offset: id of the first of the E experts in moe.
        out: [T, H] to write to, of the dtype of x.
        workspace: scratch memory of sufficient size; with it and out, nothing is allocated, but for
            a copy of x in back end "cute" where its rows do not start at multiples of 16 bytes.
        deterministic: False allows a back end to give other bits in each run.
        rounding: "fused" as above, or "eager", for bf16 and fp16 activations: as torch's operators
            one after the other in the dtype of x, so that a model gives the tokens it gives there.
            Each of these rounds its float32 result to that dtype: both products, both additions of
            a bias (itself rounded), silu(gate) where alpha is the number 1, else alpha * gate, its
            sigmoid and gate * sigmoid; up + beta, the product of both; gelu(gate) and its product
            with up; relu(x)^2. limit is rounded, and so is y * weight where weights have the dtype
            of x. The sum over the slots is float32, in torch's order on a GPU (slots i, i + 4, ..
            first), and rounds once.
        backend: "auto" (then moe.backend), or the name of one (`cutemoe.backends("fused_moe")`).

    Returns:
        out; a new tensor where none was given.

    Raises:
        InvalidCall: a malformed argument; nothing was written.
        Unsupported: no back end runs this here; the message has every reason.

    >>> from cutemoe import ReLU2
    >>> w13, w2 = torch.ones(2, 1, 16).bfloat16(), torch.ones(2, 16, 1).bfloat16()
    >>> moe = prepare_moe(w13, w2)
    >>> x, ids = torch.ones(2, 16).bfloat16(), torch.tensor([[0, 1], [1, 7]])
    >>> y = fused_moe(x, moe, ids, torch.full((2, 2), 0.5), activation=ReLU2())
    >>> y[:, 0].tolist()  # (sum of 16 ones)^2, once with both experts, once with one
    [256.0, 128.0]
    """
    words: tuple[Any, ...] = ()
    tensors: list[Any] = []
    if type(moe) is PreparedMoE and not torch.compiler.is_compiling():
        numbers, params = _signature(activation)
        own, weights_ = moe.signature
        words = (
            getattr(x, "shape", None), own, type(activation), *numbers, *map(type, numbers),
            expert_offset, type(expert_offset), deterministic, type(deterministic), rounding,
            backend, out is None, workspace is None,
        )  # fmt: skip
        tensors = [x, ids, weights, *weights_, *params]
        if out is not None:
            tensors.append(out)
        if workspace is not None:
            tensors.append(getattr(workspace, "buffer", None))
        if found := _KNOWN.find(words, tensors):
            return again(*found, tensors, x, out)
    _check_options(expert_offset, deterministic, rounding, backend)
    t, requested = _tensors(x, moe, ids, weights, activation, out, workspace, backend)
    options = (expert_offset, deterministic, rounding, requested)
    call = (*operator.operands(t, moe), kind(activation), *options)
    operator.fused_moe(*call)
    if words:
        roles = tensors if out is not None else [*tensors, t.out]
        _KNOWN.keep(words, tensors, partial(operator.bind, roles, *call))
    return t.out


def _signature(activation: Any) -> tuple[tuple[Any, ...], list[torch.Tensor]]:
    """What is no tensor of an activation, and its tensors, for `runtime.recall`."""
    if type(activation) is not SwiGLU:
        return (activation,), []
    params = (activation.alpha, activation.beta, activation.limit)
    tensors = [p for p in params if isinstance(p, torch.Tensor)]
    if not tensors:
        return params, tensors
    return tuple(torch.Tensor if isinstance(p, torch.Tensor) else p for p in params), tensors


def _check_options(expert_offset: Any, deterministic: Any, rounding: Any, backend: Any) -> None:
    _check_type("expert_offset", expert_offset, int, "an integer")
    _check_type("deterministic", deterministic, bool, "True or False")
    _check_type("rounding", rounding, str, "a name")
    _check_type("backend", backend, str, "a name")


def _tensors(
    x: Any,
    moe: Any,
    ids: Any,
    weights: Any,
    activation: Any,
    out: Any,
    workspace: Any,
    backend: str,
) -> tuple[MoETensors, str]:
    """The tensors of a public call and the back end it asks for."""
    if not isinstance(moe, PreparedMoE):
        raise invalid("moe", "a PreparedMoE", type(moe).__name__, "cutemoe.prepare_moe")
    for name, t in (("x", x), ("ids", ids), ("weights", weights)):
        check_inference_tensor(name, t)
    if out is None:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
    check_inference_tensor("out", out)
    if workspace is not None and not isinstance(workspace, Workspace):
        raise invalid("workspace", "a Workspace", type(workspace).__name__, "Workspace.for_moe")
    kind(activation)
    params = (1.0, 0.0, None)
    if isinstance(activation, SwiGLU):
        params = (activation.alpha, activation.beta, activation.limit)
    for name, p in zip(("alpha", "beta", "limit"), params, strict=True):
        if isinstance(p, torch.Tensor):
            check_inference_tensor(f"activation.{name}", p)
    t = MoETensors(
        x=x,
        ids=ids,
        weights=weights,
        out=out,
        w13=moe.w13,
        w2=moe.w2,
        b13=moe.b13,
        b2=moe.b2,
        input_scale1=moe.input_scale1,
        input_scale2=moe.input_scale2,
        alpha=params[0],
        beta=params[1],
        limit=params[2],
        workspace=None if workspace is None else workspace.buffer,
    )
    return t, moe.backend if backend == "auto" else backend


def _describe(
    x: torch.Tensor,
    moe: PreparedMoE,
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    activation: Activation = SwiGLU(),  # noqa: B008  (frozen)
    expert_offset: int = 0,
    out: torch.Tensor | None = None,
    workspace: Workspace | None = None,
    deterministic: bool = True,
    rounding: str = "fused",
    backend: str = "auto",
) -> tuple[Problem, torch.device, str]:
    _check_options(expert_offset, deterministic, rounding, backend)
    t, requested = _tensors(x, moe, ids, weights, activation, out, workspace, backend)
    problem = Problem.of(
        t,
        activations=moe.activations,
        gate_up=moe.gate_up,
        activation=kind(activation),
        expert_offset=expert_offset,
        deterministic=deterministic,
        rounding=rounding,
    )
    return problem, x.device, requested


def _bind(*args: Any, **options: Any) -> tuple[Again | None, list[torch.Tensor], Any]:
    given = inspect.signature(fused_moe).bind(*args, **options)
    given.apply_defaults()
    o = given.arguments
    names = ("expert_offset", "deterministic", "rounding")
    _check_options(*[o[name] for name in (*names, "backend")])
    operands = ("x", "moe", "ids", "weights", "activation", "out", "workspace", "backend")
    t, requested = _tensors(*[o[name] for name in operands])
    call = (
        *operator.operands(t, o["moe"]), kind(o["activation"]), *[o[name] for name in names],
        requested,
    )  # fmt: skip
    tensors = distinct(call)
    return operator.bind(tensors, *call), tensors, t.out


FUSED_MOE = Op("fused_moe", BACKENDS, _describe, _bind)
