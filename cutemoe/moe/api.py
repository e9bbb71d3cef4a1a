"""The public MoE functions: routing and the fused expert layer."""

from __future__ import annotations

from typing import Any

import torch

from cutemoe.errors import invalid
from cutemoe.gemm.api import check_inference_tensor
from cutemoe.gemm.weight import PackedWeight
from cutemoe.moe.activation import Activation, SwiGLU, kind
from cutemoe.moe.plan import BACKENDS, ROUTE_BACKENDS
from cutemoe.moe.prepare import PreparedMoE, prepare_moe
from cutemoe.moe.problem import Problem
from cutemoe.moe.routing import RouteProblem
from cutemoe.moe.tensors import MoETensors, RouteTensors
from cutemoe.moe.workspace import Workspace
from cutemoe.runtime import backend as back_ends
from cutemoe.runtime.device import Device
from cutemoe.runtime.op import Op, define

__all__ = ["FUSED_MOE", "ROUTE", "fused_moe", "prepare_moe", "route"]


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
    """
    _check_route(logits, top_k, method, renormalize, bias, n_group, topk_group, scale, backend)
    return _route(
        logits, bias, top_k, method, renormalize, n_group, topk_group, float(scale), backend
    )


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


def _route_call(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    method: str,
    renormalize: bool,
    n_group: int | None,
    topk_group: int | None,
    scale: float,
) -> tuple[RouteProblem, RouteTensors]:
    problem = RouteProblem.of(
        logits,
        bias,
        top_k=top_k,
        method=method,
        renormalize=renormalize,
        n_group=n_group,
        topk_group=topk_group,
        scale=scale,
    )
    shape = (problem.tokens, top_k)
    ids = torch.empty(shape, dtype=torch.int32, device=logits.device)
    weights = torch.empty(shape, dtype=torch.float32, device=logits.device)
    return problem, RouteTensors(logits, bias, ids, weights)


def _run_route(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *call, backend = args
    problem, t = _route_call(*call)
    device = Device.of(t.logits.device)
    chosen = back_ends.choose("route", ROUTE_BACKENDS, problem, device, backend)
    if problem.tokens:
        chosen.load()(problem, chosen.config(problem, device), t)
    return t.ids, t.weights


def _fake_route(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, t = _route_call(*args[:-1])
    return t.ids, t.weights


_route = define(
    "route(Tensor logits, Tensor? bias, int top_k, str method, bool renormalize, int? n_group, "
    "int? topk_group, float scale, str backend) -> (Tensor, Tensor)",
    _run_route,
    _fake_route,
)


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
    problem, _ = _route_call(
        logits, bias, top_k, method, renormalize, n_group, topk_group, float(scale)
    )
    return problem, logits.device, backend


ROUTE = Op("route", ROUTE_BACKENDS, _describe_route)


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
        weights: [T, K] float32.
        activation: SwiGLU or GeGLU for gated layers, ReLU2 for ungated ones.
        expert_offset: id of the first of the E experts in moe.
        out: [T, H] to write to, of the dtype of x.
        workspace: scratch memory of sufficient size; with it and out, nothing is allocated.
        deterministic: False allows a back end to give other bits in each run.
        backend: "auto" (then moe.backend), "triton" or "reference".

    Returns:
        out; a new tensor where none was given.

    Raises:
        InvalidCall: a malformed argument; nothing was written.
        Unsupported: no back end runs this here; the message has every reason.
    """
    _check_options(expert_offset, deterministic, backend)
    t, requested = _tensors(x, moe, ids, weights, activation, out, workspace, backend)
    _fused_moe(
        t.x,
        t.ids,
        t.weights,
        t.out,
        t.workspace,
        _parts(t),
        [*moe.w13.shape, moe.intermediate],
        moe.w13.format,
        moe.w13.layout,
        moe.w13.group_size,
        None if isinstance(t.alpha, torch.Tensor) else t.alpha,
        None if isinstance(t.beta, torch.Tensor) else t.beta,
        None if isinstance(t.limit, torch.Tensor) else t.limit,
        moe.activations,
        moe.gate_up,
        kind(activation),
        expert_offset,
        deterministic,
        requested,
    )
    return t.out


def _check_options(expert_offset: Any, deterministic: Any, backend: Any) -> None:
    _check_type("expert_offset", expert_offset, int, "an integer")
    _check_type("deterministic", deterministic, bool, "True or False")
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


def _parts(t: MoETensors) -> list[torch.Tensor | None]:
    """The optional tensors of the operator, in the order `_call` takes them apart."""
    params = [p if isinstance(p, torch.Tensor) else None for p in (t.alpha, t.beta, t.limit)]
    weights = [p for w in (t.w13, t.w2) for p in (w.data, w.scale, w.factor)]
    return [*weights, t.b13, t.b2, t.input_scale1, t.input_scale2, *params]


def _call(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    workspace: torch.Tensor | None,
    parts: list[torch.Tensor | None],
    shape: list[int],
    format: str,
    layout: str,
    group_size: int | None,
    alpha: float | None,
    beta: float | None,
    limit: float | None,
    activations: str,
    gate_up: str,
    activation: str,
    expert_offset: int,
    deterministic: bool,
) -> tuple[Problem, MoETensors]:
    experts, n13, hidden, inter = shape
    data13, scale13, factor13, data2, scale2, factor2, b13, b2, in1, in2, *params = parts
    if data13 is None or data2 is None:
        raise invalid("parts", "weights", "None")
    pairs = zip(params, (alpha, beta, limit), strict=True)
    alpha_, beta_, limit_ = (number if tensor is None else tensor for tensor, number in pairs)
    shape13, shape2 = (experts, n13, hidden), (experts, hidden, inter)
    t = MoETensors(
        x=x,
        ids=ids,
        weights=weights,
        out=out,
        w13=PackedWeight(data13, scale13, factor13, format, layout, group_size, shape13),
        w2=PackedWeight(data2, scale2, factor2, format, layout, group_size, shape2),
        b13=b13,
        b2=b2,
        input_scale1=in1,
        input_scale2=in2,
        alpha=1.0 if alpha_ is None else alpha_,
        beta=0.0 if beta_ is None else beta_,
        limit=limit_,
        workspace=workspace,
    )
    problem = Problem.of(
        t,
        activations=activations,
        gate_up=gate_up,
        activation=activation,
        expert_offset=expert_offset,
        deterministic=deterministic,
    )
    return problem, t


def _run(*args: Any) -> None:
    *call, backend = args
    problem, t = _call(*call)
    device = Device.of(t.x.device)
    chosen = back_ends.choose("fused_moe", BACKENDS, problem, device, backend)
    if problem.tokens:
        chosen.load()(problem, chosen.config(problem, device), t)


def _fake(*args: Any) -> None:
    _call(*args[:-1])


_fused_moe = define(
    "fused_moe(Tensor x, Tensor ids, Tensor weights, Tensor(a!) out, Tensor(b!)? workspace, "
    "Tensor?[] parts, SymInt[] shape, str format, str layout, int? group_size, float? alpha, "
    "float? beta, float? limit, str activations, str gate_up, str activation, int expert_offset, "
    "bool deterministic, str backend) -> ()",
    _run,
    _fake,
)


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
    backend: str = "auto",
) -> tuple[Problem, torch.device, str]:
    _check_options(expert_offset, deterministic, backend)
    t, requested = _tensors(x, moe, ids, weights, activation, out, workspace, backend)
    problem = Problem.of(
        t,
        activations=moe.activations,
        gate_up=moe.gate_up,
        activation=kind(activation),
        expert_offset=expert_offset,
        deterministic=deterministic,
    )
    return problem, x.device, requested


FUSED_MOE = Op("fused_moe", BACKENDS, _describe)
