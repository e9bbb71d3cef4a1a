"""Registration with torch.library: one schema, one implementation for every device, one fake.

Decision: `Library.define` and `impl`. Rejected: `torch.library.custom_op`, which costs 27-40 us a
call where this costs 4-6 (measured on two CPU cores, 2026-11, torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cutemoe.runtime.backend import Backend
from cutemoe.runtime.device import target
from cutemoe.runtime.replay import Again

_LIBRARY = torch.library.Library("cutemoe", "DEF")


@dataclass(frozen=True)
class Op:
    """A public function with its back ends, for `explain` and `backends`.

    Attributes:
        name: name of the public function.
        backends: in order of preference, the reference last.
        describe: takes the arguments of the public function, validates them as the call would, and
            returns the problem, the device it runs on and the requested back end.
        bind: takes them too, launches nothing, and returns what makes the call again, the tensors
            it takes, and what the call returns.
    """

    name: str
    backends: tuple[Backend, ...]
    describe: Callable[..., tuple[Any, torch.device, str]]
    bind: Callable[..., tuple[Again | None, list[torch.Tensor], Any]]


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Registers `cutemoe::<schema>` and returns the callable operator.

    The implementation runs with the device of its first tensor argument current, so that kernels
    launch there whatever device the caller had selected. Inside `compile_only` calls on meta
    tensors run the implementation too, so what is compiled is what is launched.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, implementation, "CPU")
    _LIBRARY.impl(name, _on_device_of_first(implementation), "CUDA")
    faked = _or_compile(implementation, fake)
    torch.library.register_fake(f"cutemoe::{name}", faked, lib=_LIBRARY)
    return getattr(torch.ops.cutemoe, name).default


def _or_compile(implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    def on_meta(*args: Any, **kwargs: Any) -> Any:
        return (fake if target() is None else implementation)(*args, **kwargs)

    return on_meta


def _on_device_of_first(implementation: Callable[..., Any]) -> Callable[..., Any]:
    def guarded(first: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if first.device.index == torch.cuda.current_device():
            return implementation(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return implementation(first, *args, **kwargs)

    return guarded
