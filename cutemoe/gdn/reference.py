"""What gated delta net decode and draft verification mean: a token loop in torch.

Every head h of v keeps a state S [DV, DK] and shares the q and k of head h // (HV / HQ). A token is

    S <- exp(log_g) S;   u = beta (v - S k);   S <- S + u k^T;   o = S q

A draft records u, k and log_g of the tokens computed but not yet accepted; accepting a of them is
S <- exp(log_g) S + u k^T for the first a, in token order, which repeats the very operations of the
loop, so the folded state has the bits the loop gave.

This is the back end of CPU tensors, and with dtype=float64 the oracle of the tests.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from cutemoe.gdn.problem import Problem
from cutemoe.gdn.tensors import GDNTensors

NORM_EPS = 1e-6


class Run(NamedTuple):
    """Outputs [B, T, HV, DV], states after each token [B, T, HV, DV, DK], u [B, T, HV, DV]."""

    out: torch.Tensor
    states: torch.Tensor
    u: torch.Tensor


def gates(given: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """log g and beta [B, T, HV]; log g is 0 where exp(A_log) or softplus is, whatever the other."""
    if len(given) == 2:
        return given[0].to(dtype), given[1].to(dtype)
    # torch's softplus and sigmoid on a CPU round another way where strides are
    a, b, A_log, dt_bias = (x.to(dtype).contiguous() for x in given)
    rate = A_log.exp()
    soft = torch.nn.functional.softplus(a + dt_bias, threshold=20.0)
    log_g = torch.where((rate == 0) | (soft == 0), 0.0, -rate * soft)
    return log_g, b.sigmoid()


def norm_factor(x: torch.Tensor, qk_l2norm: bool) -> torch.Tensor:
    """1 / sqrt(sum x^2 + 1e-6) over the last dimension, or 1."""
    if not qk_l2norm:
        return torch.ones_like(x[..., 0])
    return (x.square().sum(-1) + NORM_EPS).rsqrt()


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_g: torch.Tensor,
    beta: torch.Tensor,
    S: torch.Tensor,
    scale: float,
    qk_l2norm: bool,
    dtype: torch.dtype = torch.float32,
) -> Run:
    """The token loop, every operation in `dtype`.

    Args:
        q, k: [B, T, HQ, DK].
        v: [B, T, HV, DV].
        log_g, beta: [B, T, HV].
        S: states [B, HV, DV, DK] before the first token.
        scale: factor of q.
        qk_l2norm: divide q and k by their norms.
        dtype: float32 or float64.
    """
    group = v.shape[2] // q.shape[2]
    q, k, v, log_g, beta, S = (x.to(dtype).contiguous() for x in (q, k, v, log_g, beta, S))
    r_k = norm_factor(k, qk_l2norm).repeat_interleave(group, 2)[..., None]
    r_q = norm_factor(q, qk_l2norm).repeat_interleave(group, 2)[..., None] * scale
    q, k = q.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
    g, beta = log_g.exp()[..., None, None], beta[..., None]
    out, states, us = [], [], []
    for t in range(v.shape[1]):
        S = S * g[:, t]
        u = beta[:, t] * (v[:, t] - r_k[:, t] * _dot_rows(S, k[:, t]))
        S = rank1(S, u * r_k[:, t], k[:, t])
        out.append(_dot_rows(S, q[:, t]) * r_q[:, t])
        states.append(S)
        us.append(u)
    if not out:
        return Run(v, S[:, None, ...][:, :0], v)
    return Run(torch.stack(out, 1), torch.stack(states, 1), torch.stack(us, 1))


def eager_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_g: torch.Tensor,
    beta: torch.Tensor,
    S: torch.Tensor,
    scale: float,
    qk_l2norm: bool,
) -> Run:
    """The token loop with the operators of transformers' `torch_recurrent_gated_delta_rule`.

    Args: as of `delta_rule` in float32, but S [B, HV, DK, DV], as are the states of the result.
    """
    group = v.shape[2] // q.shape[2]
    q, k = q.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
    q, k, v, log_g, beta = (
        x.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        for x in (q, k, v, log_g, beta)
    )
    if qk_l2norm:
        q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPS) for x in (q, k))
    q = q / (math.inf if scale == 0 else 1.0 / scale)
    out, states, us = [], [], []
    for t in range(v.shape[2]):
        S = S * log_g[:, :, t].exp()[..., None, None]
        kept = (S * k[:, :, t, :, None]).sum(dim=-2)
        u = (v[:, :, t] - kept) * beta[:, :, t, None]
        S = S + k[:, :, t, :, None] * u[..., None, :]
        out.append((S * q[:, :, t, :, None]).sum(dim=-2))
        states.append(S)
        us.append(u)
    return Run(torch.stack(out, 1), torch.stack(states, 1), torch.stack(us, 1))


def _decoded(problem: Problem, x: GDNTensors, slots: torch.Tensor) -> Run:
    """The token loop from the states of these slots, as the problem rounds."""
    pool, (log_g, beta) = _vk(x.state, problem)[slots].float(), gates(x.gates, torch.float32)
    if problem.rounding == "fused":
        return delta_rule(x.q, x.k, x.v, log_g, beta, pool, x.scale, problem.qk_l2norm)
    S = pool.transpose(-1, -2).contiguous()
    run = eager_rule(x.q, x.k, x.v, log_g, beta, S, x.scale, problem.qk_l2norm)
    return run._replace(states=run.states.transpose(-1, -2))


def _dot_rows(S: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (S * x[..., None, :]).sum(-1)


def rank1(S: torch.Tensor, u: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """S + u k^T of every head."""
    return S + u[..., None] * k[..., None, :]


def gdn_decode(problem: Problem, config: None, x: GDNTensors) -> None:
    """Writes out, and where asked for the final states and the states after each token."""
    if problem.B == 0 or problem.T == 0:
        return
    slots, live = _slots(problem, x)
    if problem.slots == 0:
        x.out.zero_()
        return
    pool = _vk(x.state, problem)
    run = _decoded(problem, x, slots)
    _store_out(x.out, run.out, live)
    if x.intermediate_states is not None:
        target = _vk(x.intermediate_states, problem)[:, : problem.T]
        target.copy_(torch.where(_like(live, target), run.states.to(target.dtype), target))
    if x.intermediate_indices is not None:
        to = x.intermediate_indices.long()
        stored = (to >= 0) & (to < problem.slots) & live[:, None]
        to = to.clamp(0, problem.slots - 1).flatten()
        _write_rows(pool, to, stored.flatten(), run.states.flatten(0, 1).to(pool.dtype))
    if problem.update:
        _write_rows(pool, slots, live, run.states[:, -1].to(pool.dtype))


def gdn_verify(problem: Problem, config: None, x: GDNTensors) -> None:
    """Folds the accepted tokens into state, writes out, and records the new window."""
    draft, num_accepted = x.opened()
    if problem.B == 0:
        return
    slots, live = _slots(problem, x)
    if problem.slots == 0:
        x.out.zero_()
        return
    T, pool = problem.T, _vk(x.state, problem)
    mark = draft.mark[slots, 0, 0].int()
    half, count = mark & 1, mark >> 1
    accepted = torch.minimum(num_accepted.clamp(min=0), count)
    old = pool[slots]
    S = _fold(problem, x, old.float().contiguous(), slots, half, accepted)
    new = torch.where(_like(accepted > 0, old), S.to(pool.dtype), old)
    _write_rows(pool, slots, live, new)
    log_g, beta = gates(x.gates, torch.float32)
    run = delta_rule(x.q, x.k, x.v, log_g, beta, new.float(), x.scale, problem.qk_l2norm)
    _store_out(x.out, run.out, live)
    half = 1 - half
    if T > 0:
        _write_rows(draft.u[:, :T], slots, live, run.u)
        k_rnorm = norm_factor(x.k.float(), problem.qk_l2norm)
        for record, value in ((draft.k, x.k), (draft.k_rnorm, k_rnorm), (draft.log_g, log_g)):
            _write_rows(record[:, :, :T], slots, live, value.to(record.dtype), half)
    mark = (half + 2 * T).to(draft.mark.dtype)
    _write_rows(draft.mark, slots, live, mark[:, None, None].expand(-1, *draft.mark.shape[1:]))


def _fold(problem: Problem, x: GDNTensors, S, slots, half, accepted) -> torch.Tensor:
    """S after the first `accepted` recorded tokens of each row."""
    draft, _ = x.opened()
    group = problem.HV // problem.HQ
    u, g = draft.u[slots], draft.log_g[slots, half].exp()
    r_k = draft.k_rnorm[slots, half].repeat_interleave(group, 2)
    k = draft.k[slots, half].float().repeat_interleave(group, 2)
    for t in range(draft.u.shape[1]):
        folded = rank1(S * g[:, t, :, None, None], u[:, t] * r_k[:, t, :, None], k[:, t])
        S = torch.where(_like(accepted > t, S), folded, S)
    return S


def _slots(problem: Problem, x: GDNTensors) -> tuple[torch.Tensor, torch.Tensor]:
    """A slot that exists for every row, and which rows are live."""
    if x.state_indices is None:
        slots = torch.arange(problem.B, device=x.q.device)
        return slots, slots >= 0
    slots = x.state_indices.long()
    live = (slots >= 0) & (slots < problem.slots)
    return slots.clamp(0, max(problem.slots - 1, 0)), live


def _vk(state: torch.Tensor, problem: Problem) -> torch.Tensor:
    return state if problem.layout == "vk" else state.transpose(-1, -2)


def _like(flag: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return flag.view(-1, *[1] * (x.dim() - 1))


def _store_out(out: torch.Tensor, value: torch.Tensor, live: torch.Tensor) -> None:
    out.copy_(torch.where(_like(live, value), value, 0.0))


def _write_rows(target: torch.Tensor, slots, live, rows: torch.Tensor, *index: Any) -> None:
    """target[slots[b], index...] = rows[b] for every live b, without reading a value on the host.

    A padding row repeats the first live row; where none is live, a slot gets its own bytes back.
    """
    source = torch.where(live, torch.arange(len(live), device=live.device), live.int().argmax())
    at = tuple(i[source] for i in (slots, *index))
    target[at] = torch.where(live.any(), rows[source], target[at])
