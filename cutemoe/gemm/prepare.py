"""PreparedGroupedGemm: validated weights of a grouped GEMM, packed once."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cutemoe.errors import invalid
from cutemoe.formats import QuantizedTensor, broken_scales
from cutemoe.gemm.plan import BACKENDS, weight_layout
from cutemoe.gemm.problem import ACTIVATIONS
from cutemoe.gemm.weight import DENSE, PackedWeight
from cutemoe.runtime.backend import Backend
from cutemoe.runtime.device import Device

NAMES = tuple(ACTIVATIONS.values())


@dataclass(frozen=True, eq=False)
class PreparedGroupedGemm:
    """Weights [G, N, Kdim] ready for `grouped_gemm`; immutable, without caches.

    Attributes:
        weight: the packed weights.
        activations: format of x, "bf16", "fp16" or "fp8".
        backend: what a call with backend="auto" asks for.
    """

    weight: PackedWeight
    activations: str
    backend: str

    @property
    def shape(self) -> tuple[int, int, int]:
        """(G, N, Kdim)."""
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.weight.device

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.weight.nbytes

    def __repr__(self) -> str:
        g, n, k = self.shape
        return (
            f"PreparedGroupedGemm({g} groups, {n} x {k}, {self.weight.format} weights, "
            f"{self.activations} activations, {self.nbytes} bytes on {self.device})"
        )


def prepare_grouped_gemm(
    w: QuantizedTensor | torch.Tensor,
    *,
    activations: str = "bf16",
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> PreparedGroupedGemm:
    """Validates and packs the weights of a grouped GEMM; reads them once, so it may synchronise.

    Args:
        w: [G, N, Kdim], QuantizedTensor or dense bf16 or fp16. Its memory is shared where no move
            is needed, and must not change afterwards.
        activations: format of the x to come, "bf16", "fp16" or "fp8".
        device: where the weights shall live; by default where they are.
        backend: back end for calls that say "auto".

    Raises:
        InvalidCall: a malformed argument, or scales that are NaN, infinite or negative.
    """
    if activations not in NAMES:
        raise invalid("activations", f"one of {NAMES}", repr(activations))
    check_backend(backend, BACKENDS)
    packed = pack_checked(w, "w", activations, check_device(device), backend)
    check_dense(packed, activations)
    return PreparedGroupedGemm(packed, activations, backend)


def pack_checked(
    w: QuantizedTensor | torch.Tensor,
    argument: str,
    activations: str,
    device: torch.device | None,
    backend: str,
    order: str = "plain",
) -> PackedWeight:
    """PackedWeight.of for the back end to come, after a look at the values of the scales."""
    if isinstance(w, QuantizedTensor) and w.device.type != "meta":
        why = broken_scales(w)
        if why is not None:
            raise invalid(argument, "scales that are finite and not negative", why)
    layout = "rows"
    if isinstance(w, (QuantizedTensor, torch.Tensor)):
        format = w.format if isinstance(w, QuantizedTensor) else "dense"
        layout = weight_layout(format, activations, backend, Device.of(device or w.device))
    return PackedWeight.of(w, device=device, layout=layout, order=order, argument=argument)


def check_dense(packed: PackedWeight, activations: str) -> None:
    """Raises InvalidCall where dense 16-bit weights meet activations of the other 16-bit type."""
    dense = DENSE.values()
    if packed.format in dense and activations in dense and packed.format != activations:
        want = f"{packed.format!r}, the dtype of the dense weights"
        raise invalid("activations", want, repr(activations))


def check_backend(backend: object, backends: tuple[Backend, ...]) -> None:
    """Raises InvalidCall unless backend is "auto" or the name of one of them."""
    names = ("auto", *(b.name for b in backends))
    if backend not in names:
        raise invalid("backend", "one of " + ", ".join(map(repr, names)), repr(backend))


def check_device(device: object) -> torch.device | None:
    """The device of that name, or InvalidCall."""
    if device is None:
        return None
    try:
        return torch.device(device)  # type: ignore[arg-type]
    except (RuntimeError, TypeError) as e:
        raise invalid("device", "a torch device", repr(device)) from e
