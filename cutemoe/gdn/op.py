"""The torch operators of the family: validate, choose, run; nothing else happens in between."""

from __future__ import annotations

import torch

from cutemoe.gdn import plan
from cutemoe.gdn.problem import Problem
from cutemoe.gdn.tensors import DraftTensors, GDNTensors
from cutemoe.runtime.backend import choose
from cutemoe.runtime.device import Device
from cutemoe.runtime.op import define

DECODE_SCHEMA = (
    "gdn_decode(Tensor q, Tensor k, Tensor v, Tensor[] gates, Tensor(a!) state, "
    "Tensor? state_indices, Tensor(b!)? intermediate_states, Tensor(c!) out, float scale, "
    "bool qk_l2norm, bool update_state, str state_layout, Tensor? intermediate_indices, "
    "str backend) -> ()"
)
VERIFY_SCHEMA = (
    "gdn_verify(Tensor q, Tensor k, Tensor v, Tensor[] gates, Tensor(a!) state, "
    "Tensor(b!) draft_u, Tensor(c!) draft_k, Tensor(d!) draft_k_rnorm, Tensor(e!) draft_log_g, "
    "Tensor(f!) draft_mark, Tensor num_accepted, Tensor? state_indices, Tensor(g!) out, "
    "float scale, bool qk_l2norm, str state_layout, str backend) -> ()"
)


def decode_problem(
    q, k, v, gates, state, state_indices, intermediate_states, out, scale, qk_l2norm, update_state,
    state_layout, intermediate_indices, backend,
) -> Problem:  # fmt: skip
    """The validated problem of the operator's arguments."""
    return Problem.of_decode(
        q, k, v, gates, state, state_indices, intermediate_states, out, qk_l2norm, update_state,
        state_layout, intermediate_indices,
    )  # fmt: skip


def _decode(
    q, k, v, gates, state, state_indices, intermediate_states, out, scale, qk_l2norm, update_state,
    state_layout, intermediate_indices, backend,
) -> None:  # fmt: skip
    problem = Problem.of_decode(
        q, k, v, gates, state, state_indices, intermediate_states, out, qk_l2norm, update_state,
        state_layout, intermediate_indices,
    )  # fmt: skip
    device = Device.of(q.device)
    chosen = choose("gdn_decode", plan.DECODE, problem, device, backend)
    tensors = GDNTensors(
        q, k, v, tuple(gates), state, out, scale, state_indices, intermediate_states,
        intermediate_indices=intermediate_indices,
    )  # fmt: skip
    chosen.run(problem, device, tensors)


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


def _verify(
    q, k, v, gates, state, u, k_record, k_rnorm, log_g, mark, num_accepted, state_indices, out,
    scale, qk_l2norm, state_layout, backend,
) -> None:  # fmt: skip
    problem = Problem.of_verify(
        q, k, v, gates, state, (u, k_record, k_rnorm, log_g, mark), num_accepted, state_indices,
        out, qk_l2norm, state_layout,
    )  # fmt: skip
    device = Device.of(q.device)
    chosen = choose("gdn_verify", plan.VERIFY, problem, device, backend)
    tensors = GDNTensors(
        q, k, v, tuple(gates), state, out, scale, state_indices,
        draft=DraftTensors(u, k_record, k_rnorm, log_g, mark), num_accepted=num_accepted,
    )  # fmt: skip
    chosen.run(problem, device, tensors)


def _verify_fake(*args) -> None:
    verify_problem(*args)


decode: torch._ops.OpOverload = define(DECODE_SCHEMA, _decode, _decode_fake)
verify: torch._ops.OpOverload = define(VERIFY_SCHEMA, _verify, _verify_fake)
