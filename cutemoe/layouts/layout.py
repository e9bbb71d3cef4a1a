"""What a layout is: a pair of inverse functions on bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cutemoe.errors import invalid

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Where the elements of a tensor [..., rows, columns] sit.

    Attributes:
        name: carries the architecture and the operand where they matter.
        rows, columns: what the last two dimensions must be multiples of.
        move: the tensor -> the packed tensor, padded with zero bytes where it must be.
        restore: (packed tensor, shape before) -> the tensor.
        moved: shape -> shape of the packed tensor.
    """

    name: str
    rows: int
    columns: int
    move: Callable[[torch.Tensor], torch.Tensor]
    restore: Callable[[torch.Tensor, Shape], torch.Tensor]
    moved: Callable[[Shape], Shape]

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., rows, columns], any dtype -> the packed tensor, contiguous."""
        self._check("x", tuple(x.shape))
        return self.move(x).contiguous()

    def unpack(self, packed: torch.Tensor, shape: Shape) -> torch.Tensor:
        """The inverse of `pack` for a tensor of that shape, contiguous."""
        shape = tuple(shape)
        self._check("shape", shape)
        want = tuple(self.moved(shape))
        if tuple(packed.shape) != want:
            raise invalid("packed", f"{list(want)} for {list(shape)}", list(packed.shape))
        return self.restore(packed, shape).contiguous()

    def _check(self, argument: str, shape: Shape) -> None:
        if len(shape) < 2 or shape[-2] % self.rows or shape[-1] % self.columns:
            want = f"[..., rows, columns], multiples of {self.rows} and {self.columns}"
            raise invalid(argument, f"{want} for layout {self.name!r}", list(shape))
