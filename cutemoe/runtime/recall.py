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
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch

from cutemoe.runtime import settings, tune
from cutemoe.runtime.device import target
from cutemoe.runtime.replay import Again

try:  # private to torch: without them every call is checked
    from torch._C import _len_torch_dispatch_stack
    from torch._C._autograd import _profiler_enabled  # pyright: ignore
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards: Any = None

ALIGNMENT = 16
DEVICES = ("cuda",)
_PLAIN = (torch.Tensor, torch.nn.Parameter)
# signatures of the same words: layers of a model may differ in strides or devices
_ALIKE = 4
# calls of the same words before one is remembered: that takes 0.4 to 0.7 ms (H200, 2026-11-30),
# too much for batches of a size that does not come again
CALLS = 2
_address = torch.Tensor.data_ptr
_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)


class _Known(NamedTuple):
    same: Callable[..., bool]
    device: int
    graded: bool
    backend: str
    again: Again | None


class Recall:
    """Calls of one public function, by signature."""

    def __init__(self, size: int = 1024) -> None:
        """Keeps the last `size` words, a few signatures of each; tensors are not kept."""
        self._size = size
        self._known: dict[Hashable, tuple[_Known, ...]] = {}
        self._seen: dict[Hashable, int] = {}
        tune.on_change(self.forget)

    def find(self, words: Hashable, tensors: Sequence[Any]) -> tuple[Again, list[int]] | None:
        """What makes a call like this one again, and the addresses of its tensors; None where the
        call has to be checked.

        Args:
            words: every argument that is no tensor, the types of those that equal another's, which
                optional tensors are None, and the shape of one tensor, so that batches of several
                sizes are all known.
            tensors: the others, in one order.
        """
        try:
            for known in self._known.get(words, ()):
                if known.same(*tensors):
                    break
            else:
                return None
            if known.again is None:
                return None
        except TypeError:  # an argument that cannot be hashed: the checks will name it
            return None
        addresses = [*map(_address, tensors)]
        if (
            reduce(or_, addresses) % ALIGNMENT
            or _current_device() != known.device
            or torch.is_grad_enabled() != known.graded
            or settings.default_backend() != known.backend
            or _len_torch_dispatch_stack()
            or _profiler_enabled()
        ):
            return None
        return known.again, addresses

    def keep(
        self, words: Hashable, tensors: Sequence[Any], bind: Callable[[], Again | None]
    ) -> None:
        """Remembers a call that was just made, if others like it were before.

        Args:
            words, tensors: as in `find`.
            bind: gives what makes the call again from these tensors, and those that the function
                makes behind them; None where nothing does, which is remembered too.
        """
        if TensorGuards is None or _watched() or target() is not None:
            return
        first, graded = tensors[0], torch.is_grad_enabled()
        for t in tensors:
            if type(t) not in _PLAIN or t.device != first.device or (t.requires_grad and graded):
                return
            if t.device.type not in DEVICES or t.data_ptr() % ALIGNMENT:
                return
        # launches are recorded for the current device, and by capturing a stream
        if _current_device() != first.device.index or _captures():
            return
        alike = self._known.get(words, ())
        if not alike and self._count(words) < CALLS:
            return
        if any(known.again is None and known.same(*tensors) for known in alike):
            return
        again = bind()
        same = TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(t.shape) for t in tensors],
            dynamic_dims_strides=[list(t.stride()) for t in tensors],
        ).check
        if len(self._known) >= self._size and words not in self._known:
            self._known.pop(next(iter(self._known)), None)
        known = _Known(same, first.device.index, graded, settings.default_backend(), again)
        self._known[words] = (known, *alike[: _ALIKE - 1])

    def _count(self, words: Hashable) -> int:
        """How often these words were seen, this time included."""
        count = self._seen.pop(words, 0) + 1
        if count < CALLS:
            self._seen[words] = count
        if len(self._seen) > self._size:
            self._seen.pop(next(iter(self._seen)), None)
        return count

    def forget(self) -> None:
        """Every call is checked again."""
        self._known.clear()
        self._seen.clear()


def again(
    launch: Again,
    addresses: list[int],
    tensors: list[torch.Tensor],
    like: torch.Tensor,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Makes a call that was found; returns out, a contiguous one like `like` if none is given."""
    if out is None:
        out = torch.empty_like(like, memory_format=torch.contiguous_format)
        tensors.append(out)
        addresses.append(out.data_ptr())
    launch(tensors, addresses)
    return out


def _captures() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _watched() -> bool:
    return bool(_len_torch_dispatch_stack() or _profiler_enabled())
