"""A call with its tensors: the launches it makes, without the call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from cutemoe.errors import InvalidCall
from cutemoe.runtime.op import Op
from cutemoe.runtime.replay import fixed


class BoundCall:
    """What `cutemoe.bind` returns. Calling it makes the call again and returns `result`.

    Attributes:
        result: what the function returns: the same tensors every time.
    """

    __slots__ = ("_launch", "result")

    def __init__(self, launch: Callable[[], None], result: Any) -> None:
        self._launch, self.result = launch, result

    def __call__(self) -> Any:
        """Makes the call with what its tensors hold now, on torch's current stream."""
        self._launch()
        return self.result


def bound(op: Op, *args: Any, **kwargs: Any) -> BoundCall:
    """Checks a call and finds its launches; makes none."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise InvalidCall(
            f"bind: expected {op.name!r} outside of a CUDA graph capture, got one inside (bind "
            "before the capture; the bound call itself can be captured)"
        )
    _, device, _ = op.describe(*args, **kwargs)
    # launches are recorded for the current device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        again, tensors, result = op.bind(*args, **kwargs)
        return BoundCall(fixed(again, tensors), result)
