"""The torch operators of the family: validate, choose, run; nothing else happens in between."""

from __future__ import annotations

import torch

from cutemoe.gdn import plan
from cutemoe.gdn.problem import Problem
from cutemoe.gdn.tensors import DraftTensors, GDNTensors
from cutemoe.runtime.backend import Backend, choose
from cutemoe.runtime.device import Device
from cutemoe.runtime.op import define
from cutemoe.runtime.replay import Again

DECODE_SCHEMA = (
    "gdn_decode(Tensor q, Tensor k, Tensor v, Tensor[] gates, Tensor(a!) state, "
    "Tensor? state_indices, Tensor(b!)? intermediate_states, Tensor(c!) out, float scale, "
    "bool qk_l2norm, bool update_state, str state_layout, Tensor? intermediate_indices, "
    "str rounding, str backend) -> ()"
)
VERIFY_SCHEMA = (
    "gdn_verify(Tensor q, Tensor k, Tensor v, Tensor[] gates, Tensor(a!) state, "
    "Tensor(b!) draft_u, Tensor(c!) draft_k, Tensor(d!) draft_k_rnorm, Tensor(e!) draft_log_g, "
    "Tensor(f!) draft_mark, Tensor num_accepted, Tensor? state_indices, Tensor(g!) out, "
    "float scale, bool qk_l2norm, str state_layout, str backend) -> ()"
)


def decode_problem(
    q, k, v, gates, state, state_indices, intermediate_states, out, scale, qk_l2norm, update_state,
    state_layout, intermediate_indices, rounding, backend,
) -> Problem:  # fmt: skip
    """The validated problem of the operator's arguments."""
    return Problem.of_decode(
        q, k, v, gates, state, state_indices, intermediate_states, out, qk_l2norm, update_state,
        state_layout, intermediate_indices, rounding,
    )  # fmt: skip


def _prepared(
    name: str, back_ends: tuple[Backend, ...], problem: Problem, x: GDNTensors, backend: str
) -> tuple[Backend, Problem, Device, GDNTensors]:
    """The back end of a call, and what it takes."""
    device = Device.of(x.q.device)
    return choose(name, back_ends, problem, device, backend), problem, device, x


def _prepared_decode(*call) -> tuple[Backend, Problem, Device, GDNTensors]:
    q, k, v, gates, state, slots, snapshots, out, scale, *_, targets, _, backend = call
    x = GDNTensors(
        q, k, v, tuple(gates), state, out, scale, slots, snapshots, intermediate_indices=targets
    )
    return _prepared("gdn_decode", plan.DECODE, decode_problem(*call), x, backend)


def _decode(*call) -> None:
    chosen, problem, device, x = _prepared_decode(*call)
    chosen.run(problem, device, x)


def bind_decode(roles: list[torch.Tensor], *call) -> Again | None:
    """What makes calls that differ from this one by the tensors in these roles alone."""
    chosen, problem, device, x = _prepared_decode(*call)
    return chosen.again(problem, device, x, roles)


def _decode_fake(*args) -> None:
    decode_problem(*args)


def verify_problem(
    q, k, v, gates, state, u, k_record, k_rnorm, log_g, mark, num_accepted, state_indices, out,
    scale, qk_l2norm, state_layout, backend,
) -> Problem:  # fmt: skip
    """The validated problem of the operator's arguments."""
    return Problem.of_verify(
        q, k, v, gates, state, (u, k_record, k_rnorm, log_g, mark), num_accepted, state_indices,
        out, qk_l2norm, state_layout,
    )  # fmt: skip


def _prepared_verify(*call) -> tuple[Backend, Problem, Device, GDNTensors]:
    q, k, v, gates, state, *draft, accepted, slots, out, scale, _, _, backend = call
    x = GDNTensors(
        q, k, v, tuple(gates), state, out, scale, slots, draft=DraftTensors(*draft),
        num_accepted=accepted,
    )  # fmt: skip
    return _prepared("gdn_verify", plan.VERIFY, verify_problem(*call), x, backend)


def _verify(*call) -> None:
    chosen, problem, device, x = _prepared_verify(*call)
    chosen.run(problem, device, x)


def bind_verify(roles: list[torch.Tensor], *call) -> Again | None:
    """What makes calls that differ from this one by the tensors in these roles alone."""
    chosen, problem, device, x = _prepared_verify(*call)
    return chosen.again(problem, device, x, roles)


def _verify_fake(*args) -> None:
    verify_problem(*args)


decode: torch._ops.OpOverload = define(DECODE_SCHEMA, _decode, _decode_fake)
verify: torch._ops.OpOverload = define(VERIFY_SCHEMA, _verify, _verify_fake)
