"""Public functions of the gated delta net family."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from cutemoe.errors import InvalidCall, invalid
from cutemoe.gdn import op, plan
from cutemoe.gdn.draft import GDNDraft
from cutemoe.gdn.problem import Problem, pack_gates
from cutemoe.runtime.capture import distinct
from cutemoe.runtime.op import Op
from cutemoe.runtime.recall import Recall, again
from cutemoe.runtime.replay import Again

FOLDS = ("auto", "always")
_DECODED, _VERIFIED = Recall(), Recall()


def gdn_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    state: torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    g: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = True,
    update_state: bool = True,
    intermediate_states: torch.Tensor | None = None,
    intermediate_indices: torch.Tensor | None = None,
    state_layout: str = "vk",
    out: torch.Tensor | None = None,
    rounding: str = "fused",
    backend: str = "auto",
) -> torch.Tensor:
    """Runs T tokens of a gated delta net for each of B sequences, from the states of a pool.

    For every v head h, with the q and k of head h // (HV / HQ), and every token in turn:
    S <- exp(g) S;  u = beta (v - S k);  S <- S + u k^T;  out = S q. All of it in float32, whatever
    the dtypes; one rounding on the way out and one where a state is stored.

    Args:
        q, k: [B, T, HQ, DK], bfloat16, float16 or float32. T and B may be 0.
        v: [B, T, HV, DV], the dtype of q; HV a multiple of HQ.
        state: [slots, HV, DV, DK], or [slots, HV, DK, DV] with state_layout="kv"; bfloat16,
            float16 or float32; changed in place. Strided pools are used as they are.
        a, b: [B, T, HV]: log decay -exp(A_log) softplus(a + dt_bias), and beta sigmoid(b).
        A_log, dt_bias: [HV], any float dtype. A_log = -inf means no decay.
        g, beta: [B, T, HV], instead of the four above: float32 log decay, and beta.
        state_indices: int32 or int64 [B], the slot of each sequence. A negative one (or one beyond
            the pool) is padding: its out rows are zero and nothing else is touched. Live slots
            differ from one another. None: sequence b has slot b.
        scale: factor of q, by default DK ** -0.5.
        qk_l2norm: multiply q and k by 1 / sqrt(sum x^2 + 1e-6).
        update_state: store the state after the last token. False leaves the pool as it is.
        intermediate_states: [B, steps >= T, HV, ...] laid out and typed as state; [b, t] becomes
            the state after token t. Steps from T on are not touched.
        intermediate_indices: int32 or int64 [B, T] instead: the slot of `state` that the state
            after each token goes to; negative ones (or beyond the pool) are not stored. They
            differ from one another and from the slots other sequences read.
        out: [B, T, HV, DV] of v's dtype to write into.
        rounding: "fused", or "eager" for the bits of torch's operators in the loop of transformers'
            `torch_recurrent_gated_delta_rule`: no product goes unrounded into a sum, q is divided
            by 1 / scale, and sums have torch's order on the device. On a GPU one kernel for
            DK = DV = 128, float32 states, g and beta; what it does not take, torch computes.
        backend: "auto", "cute", "triton" or "reference".

    Returns:
        out, [B, T, HV, DV].

    Raises:
        InvalidCall: an argument does not fit; nothing was written.
        Unsupported: the named back end cannot run the call.
    """
    gates: tuple[Any, ...] = (a, b, A_log, dt_bias) if g is None else (g, beta)
    words, tensors = (), []
    recalls = not torch.compiler.is_compiling()
    if recalls:
        words = (
            getattr(q, "shape", None), scale, type(scale), qk_l2norm, type(qk_l2norm),
            update_state, type(update_state), state_layout, rounding, backend, len(gates),
            state_indices is None, intermediate_states is None, intermediate_indices is None,
            out is None,
        )  # fmt: skip
        optional = (state_indices, intermediate_states, intermediate_indices, out)
        tensors = [q, k, v, *gates, state, *[x for x in optional if x is not None]]
        if found := _DECODED.find(words, tensors):
            return again(*found, tensors, v, out)
    call = _decode_call(
        q, k, v, state=state, a=a, b=b, A_log=A_log, dt_bias=dt_bias, g=g, beta=beta,
        state_indices=state_indices, scale=scale, qk_l2norm=qk_l2norm, update_state=update_state,
        intermediate_states=intermediate_states, intermediate_indices=intermediate_indices,
        state_layout=state_layout, out=out, rounding=rounding, backend=backend,
    )  # fmt: skip
    op.decode(*call)
    if recalls:
        roles = tensors if out is not None else [*tensors, call[7]]
        _DECODED.keep(words, tensors, partial(op.bind_decode, roles, *call))
    return call[7]


def gdn_verify(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    state: torch.Tensor,
    draft: GDNDraft,
    num_accepted: torch.Tensor,
    a: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    A_log: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    g: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    state_indices: torch.Tensor | None = None,
    scale: float | None = None,
    qk_l2norm: bool = True,
    state_layout: str = "vk",
    fold: str = "auto",
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Accepts a prefix of the previous window, then computes T new tokens without committing them.

    The first num_accepted[b] tokens of the window that the last call opened in the slot become part
    of `state`; the others are forgotten. The T new tokens then run from there as in `gdn_decode`
    and form the new window, recorded in `draft`. So `state` and `draft` together always mean the
    accepted prefix plus the open window, and `state` holds the very bits that `gdn_decode` of the
    accepted tokens, one call a window and with rounding "fused", would have left there. One
    exception: back end "cute" decodes a single token of layout "vk" by sums in another order, so
    a window of which one token is accepted agrees with it to rounding.

    Args:
        q, k, v, a, b, A_log, dt_bias, g, beta, state_indices, scale, qk_l2norm, state_layout, out,
            backend: as in `gdn_decode`; T may differ from call to call, up to draft.max_tokens.
            A padding row leaves its state and its window alone.
        state: the pool, changed in place where tokens are accepted.
        draft: `GDNDraft.allocate` for this pool, changed in place.
        num_accepted: int32 or int64 [B] on the device; clamped to 0 .. length of the window, which
            is 0 for a fresh slot.
        fold: when accepted tokens enter `state`: "always" in this call; "auto" may keep them in the
            draft for longer where that is faster. Both fold at once today.

    Returns:
        out, [B, T, HV, DV].

    Raises:
        InvalidCall: an argument does not fit; nothing was written.
        Unsupported: the named back end cannot run the call.
    """
    gates: tuple[Any, ...] = (a, b, A_log, dt_bias) if g is None else (g, beta)
    words, tensors = (), []
    recalls = not torch.compiler.is_compiling() and isinstance(draft, GDNDraft)
    if recalls:
        words = (
            getattr(q, "shape", None), scale, type(scale), qk_l2norm, type(qk_l2norm),
            state_layout, fold, backend, len(gates), state_indices is None, out is None,
        )  # fmt: skip
        optional = [x for x in (state_indices, out) if x is not None]
        tensors = [q, k, v, *gates, state, num_accepted, *draft.tensors, *optional]
        if found := _VERIFIED.find(words, tensors):
            return again(*found, tensors, v, out)
    call = _verify_call(
        q, k, v, state=state, draft=draft, num_accepted=num_accepted, a=a, b=b, A_log=A_log,
        dt_bias=dt_bias, g=g, beta=beta, state_indices=state_indices, scale=scale,
        qk_l2norm=qk_l2norm, state_layout=state_layout, fold=fold, out=out, backend=backend,
    )  # fmt: skip
    op.verify(*call)
    if recalls:
        roles = tensors if out is not None else [*tensors, call[12]]
        _VERIFIED.keep(words, tensors, partial(op.bind_verify, roles, *call))
    return call[12]


def _decode_call(
    q, k, v, *, state, a=None, b=None, A_log=None, dt_bias=None, g=None, beta=None,
    state_indices=None, scale=None, qk_l2norm=True, update_state=True, intermediate_states=None,
    intermediate_indices=None, state_layout="vk", out=None, rounding="fused", backend="auto",
) -> tuple:  # fmt: skip
    """The arguments of the operator."""
    _tensors(q=q, k=k, v=v, state=state)
    _optional_tensors(
        a=a, b=b, A_log=A_log, dt_bias=dt_bias, g=g, beta=beta, state_indices=state_indices,
        intermediate_states=intermediate_states, intermediate_indices=intermediate_indices, out=out,
    )  # fmt: skip
    _flags(qk_l2norm=qk_l2norm, update_state=update_state)
    _words(state_layout=state_layout, rounding=rounding, backend=backend)
    gates = pack_gates(a, b, A_log, dt_bias, g, beta)
    return (
        q, k, v, gates, state, state_indices, intermediate_states,
        torch.empty_like(v, memory_format=torch.contiguous_format) if out is None else out,
        _scale(scale, q), qk_l2norm, update_state, state_layout, intermediate_indices, rounding,
        backend,
    )  # fmt: skip


def _verify_call(
    q, k, v, *, state, draft, num_accepted, a=None, b=None, A_log=None, dt_bias=None, g=None,
    beta=None, state_indices=None, scale=None, qk_l2norm=True, state_layout="vk", fold="auto",
    out=None, backend="auto",
) -> tuple:  # fmt: skip
    """The arguments of the operator."""
    _tensors(q=q, k=k, v=v, state=state, num_accepted=num_accepted)
    _optional_tensors(
        a=a, b=b, A_log=A_log, dt_bias=dt_bias, g=g, beta=beta, state_indices=state_indices, out=out
    )
    if not isinstance(draft, GDNDraft):
        raise invalid("draft", "a GDNDraft", type(draft).__name__, "GDNDraft.allocate makes one")
    _flags(qk_l2norm=qk_l2norm)
    _words(state_layout=state_layout, backend=backend)
    if fold not in FOLDS:
        raise invalid("fold", "'auto' or 'always'", repr(fold))
    gates = pack_gates(a, b, A_log, dt_bias, g, beta)
    return (
        q, k, v, gates, state, *draft.tensors, num_accepted, state_indices,
        torch.empty_like(v, memory_format=torch.contiguous_format) if out is None else out,
        _scale(scale, q), qk_l2norm, state_layout, backend,
    )  # fmt: skip


def _scale(scale: float | None, q: torch.Tensor) -> float:
    if scale is None:
        return max(q.shape[-1], 1) ** -0.5 if q.dim() else 1.0
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat, torch.SymInt)):
        raise invalid("scale", "a number or None", repr(scale))
    return scale


def _tensors(**named: Any) -> None:
    for name, x in named.items():
        if not isinstance(x, torch.Tensor):
            raise invalid(name, "a tensor", type(x).__name__)
        if x.requires_grad and torch.is_grad_enabled():
            raise InvalidCall(
                f"{name}: expected a tensor without grad, cutemoe is inference only; got "
                "requires_grad=True (wrap the call in torch.no_grad())"
            )


def _optional_tensors(**named: Any) -> None:
    _tensors(**{name: x for name, x in named.items() if x is not None})


def _flags(**named: Any) -> None:
    for name, x in named.items():
        if not isinstance(x, bool):
            raise invalid(name, "True or False", repr(x))


def _words(**named: Any) -> None:
    for name, x in named.items():
        if not isinstance(x, str):
            raise invalid(name, "a string", repr(x))


def _describe_decode(*args: Any, **kwargs: Any) -> tuple[Problem, torch.device, str]:
    call = _decode_call(*args, **kwargs)
    return op.decode_problem(*call), call[0].device, call[-1]


def _describe_verify(*args: Any, **kwargs: Any) -> tuple[Problem, torch.device, str]:
    call = _verify_call(*args, **kwargs)
    return op.verify_problem(*call), call[0].device, call[-1]


def _bind_decode(*args: Any, **kwargs: Any) -> tuple[Again | None, list[torch.Tensor], Any]:
    call = _decode_call(*args, **kwargs)
    tensors = distinct(call)
    return op.bind_decode(tensors, *call), tensors, call[7]


def _bind_verify(*args: Any, **kwargs: Any) -> tuple[Again | None, list[torch.Tensor], Any]:
    call = _verify_call(*args, **kwargs)
    tensors = distinct(call)
    return op.bind_verify(tensors, *call), tensors, call[12]


GDN_DECODE = Op("gdn_decode", plan.DECODE, _describe_decode, _bind_decode)
GDN_VERIFY = Op("gdn_verify", plan.VERIFY, _describe_verify, _bind_verify)
