"""FlashInfer's gated delta rule decoding functions on `cutemoe.gdn_decode`.

The documentation of FlashInfer 0.7 holds. Its kernels differ from it, or it from itself, here:

- `intermediate_states_buffer` with more steps than T: token t of row b is [b, t] here; FlashInfer's
  kernel packs the rows with a stride of T.
- a slot whose offset is beyond 31 bits is used here as any other; FlashInfer's float32 kernel for
  several tokens wraps (slot 4096 of 32 heads of 128 x 128).
- a negative index of `gated_delta_rule_decode_pretranspose`, for reading or writing, is padding
  here: a row of zeros, no slot read or written, whatever the dtype of the state. Of a bfloat16
  state FlashInfer documents slot 0 as a scratch slot, which its kernel overwrites; with a float32
  state a negative output index writes slot 0 there.
- `gated_delta_rule_mtp` leaves the rows of a given `output` that belong to padding as they are, as
  documented; where a write index alone is negative, the row is computed and not stored.
- a strided pool or state is always written in place.

Beyond FlashInfer, every function takes head sizes below 128, any number of tokens, states in
bfloat16, float16 and float32, and a keyword `backend`. Errors are `InvalidCall` instead of
AssertionError. Nothing synchronises with the host.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch

from cutemoe import gdn_decode
from cutemoe.errors import invalid

__all__ = [
    "gated_delta_rule_decode",
    "gated_delta_rule_decode_pretranspose",
    "gated_delta_rule_mtp",
]


class _Inputs(NamedTuple):
    """What all three functions share."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    A_log: torch.Tensor
    a: torch.Tensor
    dt_bias: torch.Tensor
    b: torch.Tensor
    scale: float | None
    qk_l2norm: bool
    backend: str
    out: torch.Tensor | None = None

    def decode(
        self,
        state: torch.Tensor,
        indices: torch.Tensor | None,
        *,
        update: bool = True,
        snapshots: torch.Tensor | None = None,
        slots: torch.Tensor | None = None,
        layout: str = "vk",
    ) -> torch.Tensor:
        """`gdn_decode` of these tokens."""
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (self.q, self.k, self.v))
        return gdn_decode(
            q, k, v, state=state, a=self.a, b=self.b, A_log=self.A_log, dt_bias=self.dt_bias,
            state_indices=indices, scale=self.scale, qk_l2norm=self.qk_l2norm, update_state=update,
            intermediate_states=snapshots, intermediate_indices=slots, state_layout=layout,
            out=self.out, backend=self.backend,
        )  # fmt: skip


def gated_delta_rule_mtp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    initial_state: torch.Tensor,
    initial_state_indices: torch.Tensor,
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    b: torch.Tensor,
    scale: float | None = None,
    output: torch.Tensor | None = None,
    intermediate_states_buffer: torch.Tensor | None = None,
    ssm_state_indices: torch.Tensor | None = None,
    disable_state_update: bool | None = None,
    use_qk_l2norm: bool = True,
    output_state_indices: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Several tokens for each of B sequences, from a pool of states.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V].
        initial_state: [pool_size, HV, V, K], changed in place.
        initial_state_indices: [B], the slot a row reads; negative is padding, whose row of
            `output` and whose states stay as they are.
        A_log, dt_bias: [HV].
        a, b: [B, T, HV].
        scale: of q, by default K ** -0.5.
        output: [B, T, HV, V] to write into; without it padding rows are zero.
        intermediate_states_buffer: [>= B, >= T, HV, V, K], the state of row b after token t.
        ssm_state_indices: [B, T], the slot of `initial_state` for the state after each token, in
            place of the final state; negative ones are not stored. The slots differ from one
            another. Needs disable_state_update=False and excludes the buffer.
        disable_state_update: leave the pool as it is. None means True, with a warning.
        use_qk_l2norm: normalise q and k.
        output_state_indices: [B], where the final state goes, by default where it came from;
            negative ones are not stored.
        backend: as in `cutemoe.gdn_decode`.

    Returns:
        output and initial_state.
    """
    if disable_state_update is None:
        warnings.warn(
            "disable_state_update: FlashInfer's default changes from True to False; pass one",
            FutureWarning,
            stacklevel=2,
        )
        disable_state_update = True
    x = _Inputs(q, k, v, A_log, a, dt_bias, b, scale, use_qk_l2norm, backend)
    snapshots = _rows_of_batch(intermediate_states_buffer, q)
    if ssm_state_indices is not None:
        if snapshots is not None:
            raise invalid("ssm_state_indices", "None beside intermediate_states_buffer", "both")
        if disable_state_update:
            raise invalid("disable_state_update", "False with ssm_state_indices", True)
        _check_indices("ssm_state_indices", ssm_state_indices, tuple(q.shape[:2]))
        reads = initial_state_indices
        out = x.decode(initial_state, reads, update=False, slots=ssm_state_indices)
        return _delivered(out, output, reads), initial_state
    writes = None if disable_state_update else output_state_indices
    if writes is not None:
        _check_indices("output_state_indices", writes, tuple(q.shape[:1]))
    update = not disable_state_update
    out = _decode_into(x, initial_state, initial_state_indices, writes, update, snapshots)
    return _delivered(out, output, initial_state_indices), initial_state


def gated_delta_rule_decode_pretranspose(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor | None,
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    b: torch.Tensor,
    scale: float | None = None,
    output: torch.Tensor | None = None,
    use_qk_l2norm: bool = True,
    initial_state: torch.Tensor | None = None,
    initial_state_indices: torch.Tensor | None = None,
    output_state_indices: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token (or more) for each of B sequences; states with K last.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V].
        state: [B, HV, V, K], changed in place, or None where `initial_state` is given.
        A_log, dt_bias: [HV].
        a, b: [B, T, HV].
        scale: of q, by default K ** -0.5.
        output: [B, T, HV, V] to write into.
        use_qk_l2norm: normalise q and k.
        initial_state: a pool [pool_size, HV, V, K] instead of `state`, changed in place.
        initial_state_indices: [B], the slot a row reads; negative is padding: a row of zeros.
        output_state_indices: [B], the slot a row writes, by default the one it reads; negative is
            padding as well.
        backend: as in `cutemoe.gdn_decode`.

    Returns:
        output, and state or initial_state.
    """
    direct = output if output is not None and output.dtype == v.dtype else None
    x = _Inputs(q, k, v, A_log, a, dt_bias, b, scale, use_qk_l2norm, backend, direct)
    if (initial_state is None) != (initial_state_indices is None):
        raise invalid("initial_state_indices", "a tensor with initial_state, None without", None)
    if initial_state is None:
        if output_state_indices is not None:
            raise invalid("output_state_indices", "None without initial_state", "a tensor")
        if state is None:
            raise invalid("state", "a tensor where initial_state is None", None)
        return _delivered(_in_place(x, state, "vk"), output), state
    reads = initial_state_indices
    if output_state_indices is not None and reads is not None:
        _check_indices("output_state_indices", output_state_indices, tuple(q.shape[:1]))
        reads = reads.masked_fill(output_state_indices < 0, -1)
    return _delivered(_decode_into(x, initial_state, reads, output_state_indices), output), (
        initial_state
    )


def gated_delta_rule_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    state: torch.Tensor,
    A_log: torch.Tensor,
    a: torch.Tensor,
    dt_bias: torch.Tensor,
    b: torch.Tensor,
    scale: float | None = None,
    output: torch.Tensor | None = None,
    use_qk_l2norm: bool = True,
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token (or more) for each of B sequences; states with V last.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, HV, V].
        state: [B, HV, K, V], changed in place.
        A_log, dt_bias: [HV].
        a, b: [B, T, HV].
        scale: of q, by default K ** -0.5.
        output: [B, T, HV, V] to write into.
        use_qk_l2norm: normalise q and k.
        backend: as in `cutemoe.gdn_decode`.

    Returns:
        output and state.
    """
    direct = output if output is not None and output.dtype == v.dtype else None
    x = _Inputs(q, k, v, A_log, a, dt_bias, b, scale, use_qk_l2norm, backend, direct)
    return _delivered(_in_place(x, state, "kv"), output), state


def _in_place(x: _Inputs, state: torch.Tensor, layout: str) -> torch.Tensor:
    """Row b has state b, whatever its strides."""
    if state.shape[:1] != x.q.shape[:1]:
        raise invalid("state", f"{x.q.shape[0]} rows, one a sequence", list(state.shape))
    if state.stride(-1) == 1 or state.shape[-1] == 1:
        return x.decode(state, None, layout=layout)
    packed = state.contiguous()
    out = x.decode(packed, None, layout=layout)
    state.copy_(packed)
    return out


def _decode_into(
    x: _Inputs,
    pool: torch.Tensor,
    reads: torch.Tensor | None,
    writes: torch.Tensor | None,
    update: bool = True,
    snapshots: torch.Tensor | None = None,
) -> torch.Tensor:
    """From the slots `reads` into the slots `writes`, by default the same."""
    if reads is None or writes is None or not update:
        return x.decode(pool, reads, update=update, snapshots=snapshots)
    _check_indices("initial_state_indices", reads, tuple(x.q.shape[:1]))
    # a slot may be read by one row and written by another: all are read first
    rows = pool[reads.long().clamp(0, max(pool.shape[0] - 1, 0))]
    live = (reads >= 0) & (reads < pool.shape[0])
    each = torch.arange(len(rows), device=rows.device, dtype=torch.int32)
    out = x.decode(rows, torch.where(live, each, -1), snapshots=snapshots)
    _scatter(pool, torch.where(live, writes, -1), rows)
    return out


def _scatter(pool: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> None:
    """pool[slots[i]] = rows[i] where the slot exists, without asking the device which do.

    The others repeat the first that does; where none does, slot 0 gets its own bytes back.
    """
    if not len(slots) or not pool.shape[0]:
        return
    live = (slots >= 0) & (slots < pool.shape[0])
    each = torch.arange(len(slots), device=slots.device)
    source = torch.where(live, each, live.int().argmax())
    at = slots.long()[source].clamp(0, pool.shape[0] - 1)
    pool[at] = torch.where(live.any(), rows[source], pool[at])


def _delivered(
    out: torch.Tensor, output: torch.Tensor | None, reads: torch.Tensor | None = None
) -> torch.Tensor:
    """`out` in the caller's `output`, but for the rows of padding in `reads`."""
    if output is None or output is out:
        return out
    if output.shape != out.shape:
        raise invalid("output", f"shape {list(out.shape)}", list(output.shape))
    if reads is not None:
        out = torch.where((reads >= 0)[:, None, None, None], out.to(output.dtype), output)
    return output.copy_(out)


def _rows_of_batch(buffer: torch.Tensor | None, q: torch.Tensor) -> torch.Tensor | None:
    if buffer is not None and (buffer.dim() != 5 or buffer.shape[0] < q.shape[0]):
        rows = f"[at least {q.shape[0]}, steps, HV, V, K]"
        raise invalid("intermediate_states_buffer", rows, list(buffer.shape))
    return None if buffer is None else buffer[: q.shape[0]]


def _check_indices(name: str, x: torch.Tensor | None, shape: tuple[int, ...]) -> None:
    if x is None or tuple(x.shape) != shape or x.dtype not in (torch.int32, torch.int64):
        got = None if x is None else f"{x.dtype} {list(x.shape)}"
        raise invalid(name, f"int32 or int64 of shape {list(shape)}", got)
