"""Which ops exist, which back ends they have here, and what a call would run."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from cutemoe.errors import invalid
from cutemoe.runtime import backend
from cutemoe.runtime.backend import Explanation, Reason
from cutemoe.runtime.bound import BoundCall, bound
from cutemoe.runtime.device import Device
from cutemoe.runtime.op import Op
from cutemoe.runtime.tune import Tuning

OPS = {
    "route": "cutemoe.moe.api:ROUTE",
    "fused_moe": "cutemoe.moe.api:FUSED_MOE",
    "grouped_gemm": "cutemoe.gemm.api:GROUPED_GEMM",
    "gdn_decode": "cutemoe.gdn.api:GDN_DECODE",
    "gdn_verify": "cutemoe.gdn.api:GDN_VERIFY",
}


def _find(op: str | Callable[..., Any]) -> Op:
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in OPS:
        raise invalid("op", "one of " + ", ".join(map(repr, OPS)), repr(name))
    module, _, record = OPS[name].partition(":")
    return getattr(importlib.import_module(module), record)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which back end and configuration a call would use, or why every back end refuses.

    Args:
        op: name of a public op, or the function itself.
        *args, **kwargs: the arguments of the call; tensors may live on the meta device.

    Returns:
        A record with `backend`, `config` and `reasons`; `print` shows it well.

    Raises:
        InvalidCall: the call itself is malformed, or the op does not exist.
    """
    found = _find(op)
    problem, device, requested = found.describe(*args, **kwargs)
    return backend.explain(found.name, found.backends, problem, Device.of(device), requested)


def bind(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> BoundCall:
    """A call that is made over and over with the same tensors, as in a decoding loop.

    Checks the call, compiles what it needs, and launches nothing. The result is called without
    arguments: it launches what the call would, on torch's current stream, with what the tensors
    hold then. As for a CUDA graph their memory must stay where it is; they are kept alive, with
    the results and scratch memory where none were given, which every call writes again.

    Args:
        op: name of a public op, or the function itself.
        *args, **kwargs: the arguments of the call.

    Raises:
        InvalidCall: the call itself is malformed, or the op does not exist.
        Unsupported: no back end runs this here; the message has every reason.

    >>> logits = torch.tensor([[0.0, 4.0, 1.0]])
    >>> step = bind("route", logits, 1)
    >>> logits[0, 2] = 9.0
    >>> step()[0].tolist()
    [[2]]
    """
    found = _find(op)
    return bound(found, *args, **kwargs)


def tuning(op: str, backend_name: str) -> Tuning | None:
    """How configurations of a back end are searched, or None."""
    return next((b.tuning for b in _find(op).backends if b.name == backend_name), None)


def backends(
    op: str | Callable[..., Any], device: torch.device | str | None = None
) -> list[Reason]:
    """Every back end of an op with its reason for not running on a device; None means it does.

    Args:
        op: name of a public op, or the function itself.
        device: by default the current CUDA device, or the CPU where there is none.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    here = Device.of(torch.device(device))
    return [Reason(b.name, b.unavailable(here)) for b in _find(op).backends if not b.variant]
