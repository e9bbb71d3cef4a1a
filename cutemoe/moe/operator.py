"""The registered operators `cutemoe::route` and `cutemoe::fused_moe`.

A prepared layer crosses the schema as the list of its tensors and a few names: an operator takes
tensors and plain values only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from cutemoe.errors import invalid
from cutemoe.gemm.weight import HOPPER, PackedWeight
from cutemoe.moe.plan import BACKENDS, ROUTE_BACKENDS
from cutemoe.moe.prepare import PreparedMoE
from cutemoe.moe.problem import Problem
from cutemoe.moe.routing import RouteProblem
from cutemoe.moe.tensors import MoETensors, RouteTensors
from cutemoe.moe.workspace import layout_of
from cutemoe.runtime.backend import Backend, choose
from cutemoe.runtime.capture import distinct
from cutemoe.runtime.device import Device
from cutemoe.runtime.op import define
from cutemoe.runtime.replay import Again, with_scratch


def route_call(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    method: str,
    renormalize: bool,
    n_group: int | None,
    topk_group: int | None,
    scale: float,
) -> tuple[RouteProblem, RouteTensors]:
    """Validates a call and allocates its results."""
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
    return problem, RouteTensors(logits, bias, *route_results(logits, top_k))


def route_results(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """New memory for ids and weights."""
    shape = (logits.shape[0], top_k)
    ids = torch.empty(shape, dtype=torch.int32, device=logits.device)
    return ids, torch.empty(shape, dtype=torch.float32, device=logits.device)


def _run_route(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *call, backend = args
    problem, t = route_call(*call)
    device = Device.of(t.logits.device)
    chosen = choose("route", ROUTE_BACKENDS, problem, device, backend)
    if problem.tokens:
        chosen.run(problem, device, t)
    return t.ids, t.weights


def bind_route(*args: Any) -> tuple[Again | None, list[torch.Tensor]]:
    """What makes calls that differ from this one by these tensors alone, ids and weights the last
    of them; None of no tokens."""
    *call, backend = args
    problem, t = route_call(*call)
    device = Device.of(t.logits.device)
    chosen = choose("route", ROUTE_BACKENDS, problem, device, backend)
    tensors = distinct([t.logits, t.bias, t.ids, t.weights])
    return chosen.again(problem, device, t, tensors) if problem.tokens else None, tensors


def _fake_route(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _, t = route_call(*args[:-1])
    return t.ids, t.weights


route = define(
    "route(Tensor logits, Tensor? bias, int top_k, str method, bool renormalize, int? n_group, "
    "int? topk_group, float scale, str backend) -> (Tensor, Tensor)",
    _run_route,
    _fake_route,
)


def operands(t: MoETensors, moe: PreparedMoE) -> tuple[Any, ...]:
    """The first arguments of `fused_moe`, up to `gate_up`, as `_call` takes them apart again."""
    params = (t.alpha, t.beta, t.limit)
    weights = [p for w in (t.w13, t.w2) for p in (w.data, w.scale, w.factor)]
    parts = [*weights, t.b13, t.b2, t.input_scale1, t.input_scale2]
    parts += [p if isinstance(p, torch.Tensor) else None for p in params]
    numbers = [None if isinstance(p, torch.Tensor) else p for p in params]
    shape = [*t.w13.shape, moe.intermediate]
    form = (t.w13.format, t.w13.layout, t.w13.group_size)
    names = (moe.activations, moe.gate_up)
    return (t.x, t.ids, t.weights, t.out, t.workspace, parts, shape, *form, *numbers, *names)


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
    rounding: str,
) -> tuple[Problem, MoETensors]:
    """Puts the tensors together again and validates the call."""
    experts, n13, hidden, inter = shape
    data13, scale13, factor13, data2, scale2, factor2, b13, b2, in1, in2, *params = parts
    if data13 is None or data2 is None:
        raise invalid("parts", "weights", "None")
    pairs = zip(params, (alpha, beta, limit), strict=True)
    alpha_, beta_, limit_ = (number if tensor is None else tensor for tensor, number in pairs)
    shape13, shape2 = (experts, n13, hidden), (experts, hidden, inter)
    order = gate_up if layout in HOPPER and n13 == 2 * inter else "plain"
    t = MoETensors(
        x=x,
        ids=ids,
        weights=weights,
        out=out,
        w13=PackedWeight(data13, scale13, factor13, format, layout, group_size, shape13, order),
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
        rounding=rounding,
    )
    return problem, t


def _prepared(*args: Any) -> tuple[Backend, Problem, Device, MoETensors]:
    """The back end of a call, and what it takes."""
    *call, backend = args
    problem, t = _call(*call)
    device = Device.of(t.x.device)
    return choose("fused_moe", BACKENDS, problem, device, backend), problem, device, t


def _run(*args: Any) -> None:
    chosen, problem, device, t = _prepared(*args)
    if problem.tokens:
        chosen.run(problem, device, t)


def bind(roles: list[torch.Tensor], *args: Any) -> Again | None:
    """What makes calls that differ from this one by the tensors in these roles alone; None of no
    tokens."""
    chosen, problem, device, t = _prepared(*args)
    if not problem.tokens:
        return None
    if t.workspace is not None or not chosen.replays:
        return chosen.again(problem, device, t, roles)
    # a recorded launch takes its scratch memory from the call
    nbytes = layout_of(problem).nbytes
    scratch = t.scratch(nbytes)
    again = chosen.again(problem, device, replace(t, workspace=scratch), [*roles, scratch])
    return with_scratch(again, nbytes, t.x.device)


def _fake(*args: Any) -> None:
    _call(*args[:-1])


fused_moe = define(
    "fused_moe(Tensor x, Tensor ids, Tensor weights, Tensor(a!) out, Tensor(b!)? workspace, "
    "Tensor?[] parts, SymInt[] shape, str format, str layout, int? group_size, float? alpha, "
    "float? beta, float? limit, str activations, str gate_up, str activation, int expert_offset, "
    "bool deterministic, str rounding, str backend) -> ()",
    _run,
    _fake,
)
