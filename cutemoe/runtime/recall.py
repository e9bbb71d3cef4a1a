"""Calls that were checked before: launched again without checking them again.

The checks of a call, the choice of its back end and the way through torch's dispatcher are 50 to
100 us of Python. What they depend on is the signature of the call: every argument, and of a tensor
all but its address. It is compared by torch's tensor guards, in C++, at 0.1 us a tensor (two CPU
cores, 2026-11, torch 2.13); a tuple of the same facts made in Python costs 0.7.

Decision: a recalled call goes around torch.library. So calls that something watches are not
recalled: while torch.compile traces, under a dispatch mode (fake tensors, `opcheck`), in a
transform, or with a profiler, which shows the operator by its name. Addresses that are multiples of
16 bytes are alike for every kernel; calls with others are checked each time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch

from cutemoe.runtime import settings
from cutemoe.runtime.device import target

try:  # private to torch: without them every call is checked
    from torch._C import _len_torch_dispatch_stack
    from torch._C._autograd import _profiler_enabled  # pyright: ignore
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards: Any = None

Launch = Callable[[Any], None]
ALIGNMENT = 16
DEVICES = ("cuda",)
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# signatures of the same words: layers of a model may differ in strides or devices
_ALIKE = 4
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)


class _Known(NamedTuple):
    same: Callable[..., bool]
    device: int
    graded: bool
    backend: str
    launch: Launch


class Recall:
    """Launches of one public function, by signature."""

    def __init__(self, size: int = 1024) -> None:
        """Keeps the last `size` words, a few signatures of each; tensors are not kept."""
        self._size = size
        self._known: dict[Hashable, tuple[_Known, ...]] = {}

    def find(self, words: Hashable, tensors: Sequence[Any]) -> Launch | None:
        """The launch of a call like this one, or None where it has to be checked.

        Args:
            words: every argument that is no tensor, the types of those that equal another's, which
                optional tensors are None, and the shape of one tensor, so that batches of several
                sizes are all known.
            tensors: the others, in one order.
        """
        try:
            known = next((k for k in self._known.get(words, ()) if k.same(*tensors)), None)
        except TypeError:  # an argument that cannot be hashed: the checks will name it
            return None
        if known is None:
            return None
        address = 0
        for t in tensors:
            address |= t.data_ptr()
        if (
            address % ALIGNMENT
            or _current_device() != known.device
            or torch.is_grad_enabled() != known.graded
            or settings.default_backend() != known.backend
            or _watched()
        ):
            return None
        return known.launch

    def keep(
        self, words: Hashable, tensors: Sequence[Any], bind: Callable[[], Launch | None]
    ) -> None:
        """Remembers a call that was just made; `bind` makes its launch."""
        if TensorGuards is None or _watched() or target() is not None:
            return
        first, graded = tensors[0], torch.is_grad_enabled()
        for t in tensors:
            if type(t) not in _PLAIN or t.device != first.device or (t.requires_grad and graded):
                return
            if t.device.type not in DEVICES or t.data_ptr() % ALIGNMENT:
                return
        launch = bind()
        if launch is None:
            return
        same = TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(t.shape) for t in tensors],
            dynamic_dims_strides=[list(t.stride()) for t in tensors],
        ).check
        if len(self._known) >= self._size and words not in self._known:
            del self._known[next(iter(self._known))]
        known = _Known(same, first.device.index, graded, settings.default_backend(), launch)
        self._known[words] = (known, *self._known.get(words, ())[: _ALIKE - 1])

    def forget(self) -> None:
        """Every call is checked again."""
        self._known.clear()


def _watched() -> bool:
    return bool(_len_torch_dispatch_stack() or _profiler_enabled())
