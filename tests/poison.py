"""Memory that shows who touched it: NaN-filled tensors between guard bands.

    with Poison() as poison:
        out = poison.empty((T, H), torch.bfloat16)
        ...                                       # write all of out
    # leaving checks every guard band and every gap between strided rows

`Poison.empty` fills with 0xff bytes: NaN for every float format, -1 for signed integers. `kept`
checks that tensors hold the same bytes afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

GUARD = 4096
CANARY = 0xA5


@dataclass(frozen=True)
class _Block:
    """A buffer, and where in it the tensor is: 0 there, 1 in guards and gaps."""

    name: str
    buffer: torch.Tensor
    outside: torch.Tensor
    start: int
    end: int


class Poison:
    """Allocates guarded tensors and checks the guards on `check` and on leaving the context."""

    def __init__(self, device: torch.device | str = "cpu", guard: int = GUARD) -> None:
        self.device, self.guard = device, guard
        self._blocks: list[_Block] = []

    def empty(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        strides: Sequence[int] | None = None,
        name: str = "",
    ) -> torch.Tensor:
        """A tensor of 0xff bytes, 256-byte aligned as torch's own; `strides` in elements."""
        shape = tuple(shape)
        strides = _contiguous(shape) if strides is None else tuple(strides)
        span = _span(shape, strides) * dtype.itemsize
        buffer = torch.full((span + 2 * self.guard,), CANARY, dtype=torch.uint8, device=self.device)
        outside = torch.ones(buffer.numel(), dtype=torch.bool, device=self.device)
        middle = slice(self.guard, self.guard + span)
        inside = outside[middle].view(-1, dtype.itemsize)
        for i in range(dtype.itemsize):
            inside[:, i].as_strided(
                shape, tuple(s * dtype.itemsize for s in strides), self.guard + i
            ).fill_(False)
        buffer.masked_fill_(~outside, 0xFF)
        name = name or f"tensor {len(self._blocks)} {list(shape)}"
        self._blocks.append(_Block(name, buffer, outside, self.guard, self.guard + span))
        return buffer[middle].view(dtype).as_strided(shape, strides, self.guard // dtype.itemsize)

    def of(self, values: torch.Tensor, *, strides: Sequence[int] | None = None) -> torch.Tensor:
        """A guarded copy of `values`."""
        return self.empty(values.shape, values.dtype, strides=strides).copy_(values)

    def check(self) -> None:
        """Raises if a byte outside any tensor changed."""
        for b in self._blocks:
            hit = (b.buffer != CANARY) & b.outside
            if bool(hit.any()):
                first = int(hit.nonzero()[0])
                if first < b.start:
                    place = f"{b.start - first} bytes before its start"
                elif first >= b.end:
                    place = f"{first - b.end} bytes after its end"
                else:
                    place = f"in a gap between its rows, {first - b.start} bytes after its start"
                raise AssertionError(
                    f"{b.name}: {int(hit.sum())} guard bytes were written, the first {place}"
                )

    def __enter__(self) -> Poison:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.check()


@contextmanager
def kept(**tensors: torch.Tensor | None) -> Iterator[None]:
    """Raises on leaving if a byte of a tensor changed: `with kept(x=x, state=state): ...`."""
    before = {n: _bytes(t).clone() for n, t in tensors.items() if t is not None}
    yield
    for name, old in before.items():
        t = tensors[name]
        assert t is not None
        changed = (_bytes(t) != old).nonzero().flatten()
        if len(changed):
            element = int(changed[0]) // t.element_size()
            at = tuple(int(i) for i in torch.unravel_index(torch.tensor(element), t.shape))
            raise AssertionError(f"{name}: {len(changed)} bytes changed, the first at {at}")


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return t.detach().contiguous().flatten().view(torch.uint8)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    if 0 in shape:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
