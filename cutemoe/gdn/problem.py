"""What a plan may know of a gated delta net call, and every check of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cutemoe.errors import InvalidCall, invalid

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
PARAMETERS = (*FLOATS, torch.float64)
INTEGERS = (torch.int32, torch.int64)
LAYOUTS = ("vk", "kv")
ROUNDING = ("fused", "eager")
RAW_GATES = ("a", "b", "A_log", "dt_bias")
GIVEN_GATES = ("g", "beta")


@dataclass(frozen=True)
class Problem:
    """A validated call without its tensors.

    Attributes:
        B, T: sequences and tokens of each.
        HQ, HV, DK, DV: heads of q and k, heads of v, head sizes of k and v.
        slots: states in the pool.
        dtype: of q, k, v and out.
        state: dtype of the pool.
        gates: "raw" (a, b, A_log, dt_bias) or "given" (g, beta).
        layout: "vk" (state [DV, DK]) or "kv" (state [DK, DV]).
        indexed: a slot is named for each sequence.
        qk_l2norm: q and k are normalised.
        update: the final state is written back (decode).
        snapshots: the state after each token is written out (decode).
        scattered: the state after each token goes to a slot of its own (decode).
        rounding: "fused", or "eager" as torch's operators round (decode).
        window: tokens a draft holds (verify), else None.
        record: dtype of the keys a draft records (verify), else None.
    """

    B: int
    T: int
    HQ: int
    HV: int
    DK: int
    DV: int
    slots: int
    dtype: str
    state: str
    gates: str
    layout: str
    indexed: bool
    qk_l2norm: bool
    update: bool = False
    snapshots: bool = False
    scattered: bool = False
    rounding: str = "fused"
    window: int | None = None
    record: str | None = None

    @classmethod
    def of_decode(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gates: Sequence[torch.Tensor],
        state: torch.Tensor,
        state_indices: torch.Tensor | None,
        intermediate_states: torch.Tensor | None,
        out: torch.Tensor,
        qk_l2norm: bool,
        update_state: bool,
        state_layout: str,
        intermediate_indices: torch.Tensor | None = None,
        rounding: str = "fused",
    ) -> Problem:
        """The problem of a `gdn_decode` call; raises InvalidCall for the first bad argument."""
        if rounding not in ROUNDING:
            raise invalid("rounding", f"one of {ROUNDING}", repr(rounding))
        B, T, _, DK, HV, DV = _check_inputs(q, k, v, gates, state, state_indices, state_layout)
        _check_out(out, v)
        if intermediate_states is not None:
            x = intermediate_states
            rows = (DV, DK) if state_layout == "vk" else (DK, DV)
            steps = x.shape[1] if x.dim() == 5 else T
            _shape("intermediate_states", x, (B, max(steps, T), HV, *rows), "at least T steps")
            _dtype("intermediate_states", x, (state.dtype,), "the dtype of state")
            _writable("intermediate_states", x, q)
        if intermediate_indices is not None:
            if intermediate_states is not None:
                raise invalid("intermediate_indices", "None with intermediate_states", "both")
            _shape("intermediate_indices", intermediate_indices, (B, T))
            _dtype("intermediate_indices", intermediate_indices, INTEGERS)
            _on_device("intermediate_indices", intermediate_indices, q)
        return cls(
            **_common(q, v, gates, state, state_indices, qk_l2norm, state_layout),
            update=update_state,
            snapshots=intermediate_states is not None,
            scattered=intermediate_indices is not None,
            rounding=rounding,
        )

    @classmethod
    def of_verify(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        gates: Sequence[torch.Tensor],
        state: torch.Tensor,
        draft: Sequence[torch.Tensor],
        num_accepted: torch.Tensor,
        state_indices: torch.Tensor | None,
        out: torch.Tensor,
        qk_l2norm: bool,
        state_layout: str,
    ) -> Problem:
        """The problem of a `gdn_verify` call; `draft` is (u, k, k_rnorm, log_g, mark)."""
        B, T, HQ, DK, HV, DV = _check_inputs(q, k, v, gates, state, state_indices, state_layout)
        _check_out(out, v)
        _shape("num_accepted", num_accepted, (B,))
        _dtype("num_accepted", num_accepted, INTEGERS)
        _on_device("num_accepted", num_accepted, q)
        u, keys = draft[0], draft[1]
        if u.dim() != 4:
            raise invalid("draft.u", "[slots, max_tokens, HV, DV]", _shown(u))
        P, W = state.shape[0], u.shape[1]
        shapes = ((P, W, HV, DV), (P, 2, W, HQ, DK), (P, 2, W, HQ), (P, 2, W, HV), (P, HV, DV))
        dtypes = (torch.float32, keys.dtype, torch.float32, torch.float32, torch.int16)
        names = ("u", "k", "k_rnorm", "log_g", "mark")
        for name, x, shape, dtype in zip(names, draft, shapes, dtypes, strict=True):
            _shape(f"draft.{name}", x, shape, "GDNDraft.allocate with the sizes of this call")
            _dtype(f"draft.{name}", x, (dtype,))
            _on_device(f"draft.{name}", x, q)
            if not x.is_contiguous():
                raise invalid(f"draft.{name}", "a contiguous tensor", f"strides {x.stride()}")
        if keys.dtype not in (torch.float32, k.dtype):
            fix = "GDNDraft.allocate(..., dtype=torch.float32) records any k"
            raise invalid("draft.k", f"float32 or the dtype of k, {_name(k.dtype)}",
                          _name(keys.dtype), fix)  # fmt: skip
        if T > W:
            raise invalid("draft", f"max_tokens >= T = {T}", W)
        return cls(
            **_common(q, v, gates, state, state_indices, qk_l2norm, state_layout),
            window=W,
            record=_name(keys.dtype),
        )


def _common(q, v, gates, state, state_indices, qk_l2norm, layout) -> dict:
    B, T, HQ, DK = q.shape
    return {
        "B": B,
        "T": T,
        "HQ": HQ,
        "HV": v.shape[2],
        "DK": DK,
        "DV": v.shape[3],
        "slots": state.shape[0],
        "dtype": _name(v.dtype),
        "state": _name(state.dtype),
        "gates": "raw" if len(gates) == 4 else "given",
        "layout": layout,
        "indexed": state_indices is not None,
        "qk_l2norm": qk_l2norm,
    }


def _check_inputs(q, k, v, gates, state, state_indices, layout):
    if layout not in LAYOUTS:
        raise invalid("state_layout", "'vk' or 'kv'", repr(layout))
    _rank("q", q, "[B, T, HQ, DK]")
    _dtype("q", q, FLOATS)
    _rows("q", q)
    _shape("k", k, tuple(q.shape), "the shape of q")
    _rank("v", v, "[B, T, HV, DV]")
    B, T, HQ, DK = q.shape
    HV, DV = v.shape[2:]
    _shape("v", v, (B, T, HV, DV), "B and T of q")
    for name, size in (("q", HQ), ("q", DK), ("v", HV), ("v", DV)):
        if size == 0:
            raise invalid(name, "at least one head and a head size of at least 1", _shown(q))
    if HV % HQ != 0:
        raise invalid("v", f"a multiple of the {HQ} heads of q", f"{HV} heads")
    for name, x in (("k", k), ("v", v)):
        _dtype(name, x, (q.dtype,), "the dtype of q")
        _on_device(name, x, q)
        _rows(name, x)
    _check_gates(q, HV, gates)
    rows = (DV, DK) if layout == "vk" else (DK, DV)
    _rank("state", state, "[slots, HV, DV, DK]" if layout == "vk" else "[slots, HV, DK, DV]")
    _shape("state", state, (state.shape[0], HV, *rows), f"state_layout={layout!r}")
    _dtype("state", state, FLOATS)
    _writable("state", state, q)
    if state_indices is not None:
        _shape("state_indices", state_indices, (B,))
        _dtype("state_indices", state_indices, INTEGERS)
        _on_device("state_indices", state_indices, q)
    elif state.shape[0] < B:
        fix = "or name the slots by state_indices"
        raise invalid("state", f"at least B = {B} slots", state.shape[0], fix)
    return B, T, HQ, DK, HV, DV


def _check_gates(q: torch.Tensor, HV: int, gates: Sequence[torch.Tensor]) -> None:
    B, T = q.shape[:2]
    if len(gates) == 4:
        shapes = ((B, T, HV), (B, T, HV), (HV,), (HV,))
        checks = zip(
            RAW_GATES, gates, shapes, (FLOATS, FLOATS, PARAMETERS, PARAMETERS), strict=True
        )
    else:
        shapes = ((B, T, HV), (B, T, HV))
        checks = zip(GIVEN_GATES, gates, shapes, ((torch.float32,), FLOATS), strict=True)
    for name, x, shape, dtypes in checks:
        _shape(name, x, shape)
        _dtype(name, x, dtypes)
        _on_device(name, x, q)


def _check_out(out: torch.Tensor, v: torch.Tensor) -> None:
    _shape("out", out, tuple(v.shape), "the shape of v")
    _dtype("out", out, (v.dtype,), "the dtype of v")
    _writable("out", out, v)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shown(x: torch.Tensor) -> str:
    return f"{_name(x.dtype)} {list(x.shape)}"


def _rank(name: str, x: torch.Tensor, dims: str) -> None:
    if x.dim() != dims.count(",") + 1:
        raise invalid(name, dims, _shown(x))


def _shape(name: str, x: torch.Tensor, shape: tuple, why: str = "") -> None:
    if tuple(x.shape) != shape:
        raise invalid(name, f"shape {list(shape)}", _shown(x), why)


def _dtype(name: str, x: torch.Tensor, dtypes: tuple, why: str = "") -> None:
    if x.dtype not in dtypes:
        raise invalid(name, " or ".join(map(_name, dtypes)), _name(x.dtype), why)


def _on_device(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    if x.device != q.device:
        raise invalid(name, f"a tensor on {q.device}, where q is", str(x.device))


def _rows(name: str, x: torch.Tensor) -> None:
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise invalid(name, "a contiguous last dimension", f"strides {tuple(x.stride())}")


def _writable(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    _on_device(name, x, q)
    _rows(name, x)
    if x.numel() == 0:
        return
    reach = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride < reach:
            raise invalid(name, "elements that do not overlap", f"strides {tuple(x.stride())}")
        reach += (size - 1) * stride


def pack_gates(a, b, A_log, dt_bias, g, beta) -> list[torch.Tensor]:
    """The gates as one list, raw or given; InvalidCall unless exactly one set is complete."""
    raw, given = [a, b, A_log, dt_bias], [g, beta]
    if all(x is None for x in given):
        names, gates = RAW_GATES, raw
    elif all(x is None for x in raw):
        names, gates = GIVEN_GATES, given
    else:
        raise InvalidCall(
            "g, beta: expected either a, b, A_log, dt_bias or g, beta, got some of both"
        )
    for name, x in zip(names, gates, strict=True):
        if x is None:
            raise invalid(name, "a tensor", None, "pass a, b, A_log, dt_bias together, or g, beta")
    return gates
