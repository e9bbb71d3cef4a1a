"""Gated delta net layers of transformers: the one-token rule of each patched layer is gdn_decode.

Decision: a patched layer gets its own copy of its class's `forward`, whose global name
`torch_recurrent_gated_delta_rule` is bound to our rule. Only that layer changes, it needs no
package besides transformers, and torch.compile traces it. Rejected:
- assigning the name in the modelling module: changes every model of the process;
- a kernel mapping of the `kernels` package: an optional dependency whose pins move with
  transformers, and one mapping for the process again;
- a `forward` of our own: a copy of transformers' code, to be kept in step with it.
The prompt stays with transformers: its chunked rule computes it.

A cache that can be cropped (hf_speculation) takes both rules over. The rules get a state but no
cache, so the layer of the cache waits in the inbox of its net from the update of the convolution,
which comes first in every forward, to the rule.
"""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from cutemoe import gdn_decode

RULE = "torch_recurrent_gated_delta_rule"
CHUNKED = "torch_chunk_gated_delta_rule"
_SAVED, _INBOX = "_cutemoe_forward", "_cutemoe_inbox"


class Window(Protocol):
    """The layer of a cache that computes the rule itself."""

    recurrent_states: dict[int, torch.Tensor | None]

    def run(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor,
        beta: torch.Tensor, qk_l2norm: bool, chunked: Callable[..., Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """The rule over T more tokens."""
        ...


class Inbox:
    """Where the cache's layer of a running forward waits for the rule, one for every thread."""

    def __init__(self) -> None:
        self.waiting: dict[int, Window] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Inbox:
        """Itself: the copy of a patched layer shares its forward, and so the rules."""
        return self

    def put(self, window: Window) -> None:
        """Replaces what a failed forward may have left."""
        self.waiting[threading.get_ident()] = window

    def take(self, state: torch.Tensor | None) -> Window | None:
        """The waiting layer, if `state` is its own."""
        window = self.clear()
        return window if window is not None and window.recurrent_states[0] is state else None

    def clear(self) -> Window | None:
        """Takes out what waits."""
        return self.waiting.pop(threading.get_ident(), None)


def gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    backend: str = "auto",
    rounding: str = "fused",
    inbox: Inbox | None = None,
    chunked: Callable[..., Any] | None = None,
    **ignored: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The recurrent gated delta rule with the signature of transformers and flash-linear-attention.

    Args:
        query, key: [B, T, Hv, Dk]; transformers repeats them to the value heads.
        value: [B, T, Hv, Dv].
        g: [B, T, Hv] log decay. beta: [B, T, Hv].
        initial_state: [B, Hv, Dk, Dv]; None is zeros.
        output_final_state: whether the state after the last token is wanted. If so,
            `initial_state` itself is updated and returned: the layer's cache copies nothing.
        use_qk_l2norm_in_kernel: normalise query and key.
        backend, rounding: as in `cutemoe.gdn_decode`.
        inbox: of the layer; a cache that waits there computes the rule.
        chunked: what such a cache computes a prompt with.
        ignored: what transformers passes to kernels that read it.

    Returns:
        The output [B, T, Hv, Dv] in value's dtype, and the state or None.
    """
    if inbox is not None and inbox.waiting and chunked is not None:
        window = inbox.take(initial_state)
        if window is not None:
            return window.run(query, key, value, g, beta, use_qk_l2norm_in_kernel, chunked)
    if initial_state is None:
        batch, _, heads, dim = value.shape
        initial_state = value.new_zeros((batch, heads, key.shape[-1], dim), dtype=torch.float32)
    out = gdn_decode(
        query,
        key,
        value,
        state=initial_state,
        g=g.to(torch.float32),
        beta=beta.to(torch.float32),
        qk_l2norm=use_qk_l2norm_in_kernel,
        update_state=output_final_state,
        state_layout="kv",
        rounding=rounding,
        backend=backend,
    )
    return out, initial_state if output_final_state else None


def chunked_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *args: Any,
    inbox: Inbox,
    chunked: Callable[..., Any],
    initial_state: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' `chunked` rule of a prompt, unless a cache waits in the inbox."""
    if inbox.waiting:
        window = inbox.take(initial_state)
        if window is not None:
            return window.run(query, key, value, g, beta, use_qk_l2norm_in_kernel, chunked)
    return chunked(
        query, key, value, g, beta, *args, initial_state=initial_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel, **kwargs,
    )  # fmt: skip


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of a model whose class's forward calls the recurrent rule, with their names."""
    return [(name, m) for name, m in model.named_modules() if _calls_rule(type(m).forward)]


def patch_layer(layer: nn.Module, backend: str, rounding: str) -> None:
    """Lets one layer decode with cutemoe; a second call only changes how."""
    unpatch_layer(layer)
    # accelerate calls what it finds in _old_forward, with the hooks of the layer around it
    slot = "_old_forward" if "_hf_hook" in layer.__dict__ else "forward"
    box = Inbox()
    forward = types.MethodType(_rebound(type(layer).forward, box, backend, rounding), layer)
    layer.__dict__[_SAVED] = (slot, layer.__dict__.get(slot))
    layer.__dict__[_INBOX] = (box, backend)
    layer.__dict__[slot] = forward


def unpatch_layer(layer: nn.Module) -> None:
    """Gives one layer its own forward back; nothing happens where it has it."""
    if not is_patched(layer):
        return
    slot, forward = layer.__dict__.pop(_SAVED)
    layer.__dict__.pop(_INBOX)
    if forward is not None:
        layer.__dict__[slot] = forward
    else:
        layer.__dict__.pop(slot, None)


def is_patched(layer: nn.Module) -> bool:
    """Whether a layer decodes with cutemoe."""
    return _SAVED in layer.__dict__


def inbox(layer: nn.Module) -> tuple[Inbox, str]:
    """The inbox of a patched layer, and its back end."""
    return layer.__dict__[_INBOX]


def _calls_rule(function: Callable[..., Any]) -> bool:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code is not None and RULE in code.co_names


def _rebound(function: Any, box: Inbox, backend: str, rounding: str) -> types.FunctionType:
    """A copy of a function, and of the functions it wraps, that finds our rules by their names."""
    inner = getattr(function, "__wrapped__", None)
    if inner is None:
        # without __name__ torch.compile reads this dictionary, not the module of that name
        names = {k: v for k, v in function.__globals__.items() if k != "__name__"}
        waits = {"inbox": box, "chunked": names[CHUNKED]}
        names[RULE] = partial(gated_delta_rule, backend=backend, rounding=rounding, **waits)
        names[CHUNKED] = partial(chunked_rule, **waits)
        return _copy(function, names, function.__closure__)
    copied = _rebound(inner, box, backend, rounding)
    cells = function.__closure__ or ()
    cells = tuple(types.CellType(copied) if c.cell_contents is inner else c for c in cells)
    return _copy(function, function.__globals__, cells)


def _copy(function: Any, names: dict[str, Any], cells: Any) -> types.FunctionType:
    code, defaults = function.__code__, function.__defaults__
    copy = types.FunctionType(code, names, function.__name__, defaults, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__module__ = function.__module__
    return copy
