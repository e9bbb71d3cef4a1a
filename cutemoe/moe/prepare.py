"""PreparedMoE: validated weights of an expert layer, packed once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from cutemoe.errors import invalid
from cutemoe.formats import QuantizedTensor, nvfp4
from cutemoe.gemm.prepare import check_backend, check_dense, check_device, pack_checked
from cutemoe.gemm.weight import PackedWeight, Signature, signature
from cutemoe.moe.plan import BACKENDS
from cutemoe.moe.problem import ACTIVATIONS, GATE_UP

Scale = float | torch.Tensor


@dataclass(frozen=True, eq=False)
class PreparedMoE:
    """The weights of E local experts, ready for `fused_moe`; immutable, without caches.

    Attributes:
        w13, w2: packed weights [E, 2I, H] (ungated [E, I, H]) and [E, H, I].
        b13, b2: float32 biases in the row order of the weights, or None.
        input_scale1, input_scale2: float32 [E], or None (see `prepare_moe`).
        activations, gate_up: as given.
        backend: what a call with backend="auto" asks for.
        signature: what is no tensor of it, and its tensors, for `runtime.recall`.
    """

    w13: PackedWeight
    w2: PackedWeight
    b13: torch.Tensor | None
    b2: torch.Tensor | None
    input_scale1: torch.Tensor | None
    input_scale2: torch.Tensor | None
    activations: str
    gate_up: str
    backend: str
    signature: Signature = field(init=False, repr=False)

    def __post_init__(self) -> None:
        (words13, tensors13), (words2, tensors2) = self.w13.signature, self.w2.signature
        words = (words13, words2, self.activations, self.gate_up, self.backend)
        small = (self.b13, self.b2, self.input_scale1, self.input_scale2)
        object.__setattr__(self, "signature", signature(words, (*tensors13, *tensors2, *small)))

    @property
    def experts(self) -> int:
        """Local experts E."""
        return self.w2.shape[0]

    @property
    def hidden(self) -> int:
        """Width H of a token."""
        return self.w2.shape[1]

    @property
    def intermediate(self) -> int:
        """Width I between the two GEMMs."""
        return self.w2.shape[2]

    @property
    def gated(self) -> bool:
        """True where w13 holds gate and up rows."""
        return self.w13.shape[1] == 2 * self.intermediate

    @property
    def device(self) -> torch.device:
        """Device of all tensors."""
        return self.w2.device

    @property
    def nbytes(self) -> int:
        """Bytes of weights, scales and biases."""
        small = (self.b13, self.b2, self.input_scale1, self.input_scale2)
        return self.w13.nbytes + self.w2.nbytes + sum(t.nbytes for t in small if t is not None)

    def to(self, device: torch.device | str) -> PreparedMoE:
        """The same layer on another device."""
        small = ("b13", "b2", "input_scale1", "input_scale2")
        moved = {
            name: None if (t := getattr(self, name)) is None else t.to(device) for name in small
        }
        return replace(self, w13=self.w13.to(device), w2=self.w2.to(device), **moved)

    def __repr__(self) -> str:
        gated = self.gate_up if self.gated else "ungated"
        biases = [name for name in ("b13", "b2") if getattr(self, name) is not None]
        return (
            f"PreparedMoE({self.experts} experts, hidden {self.hidden}, intermediate "
            f"{self.intermediate}, {gated}, {self.w13.format} weights, {self.activations} "
            f"activations, {' and '.join(biases) or 'no biases'}, "
            f"{self.nbytes} bytes on {self.device})"
        )


def prepare_moe(
    w13: QuantizedTensor | torch.Tensor,
    w2: QuantizedTensor | torch.Tensor,
    b13: torch.Tensor | None = None,
    b2: torch.Tensor | None = None,
    *,
    activations: str = "bf16",
    gate_up: str = "gate_up",
    input_scale: Scale | tuple[Scale, Scale] | None = None,
    device: torch.device | str | None = None,
    backend: str = "auto",
) -> PreparedMoE:
    """Validates and packs the weights of an expert layer; reads scales, so it may synchronise.

    Memory is shared with the arguments where no move is needed, and must not change afterwards.

    Args:
        w13: [E, 2I, H], gate and up rows in the order of `gate_up`; ungated [E, I, H].
        w2: [E, H, I], of the same format as w13. Both QuantizedTensor, or dense bf16 or fp16.
        b13, b2: biases [E, rows of w13] and [E, H], floating point, kept in float32.
        activations: format of both GEMM inputs: "bf16", "fp16", "fp8" (e4m3 with a scale for each
            row), "nvfp4" (blocks of 16 under one multiplier) or "mxfp4" (blocks of 32).
        gate_up: "gate_up" (gate row j, up row I+j), "up_gate" or "interleaved" (2j, 2j+1).
        input_scale: (FC1, FC2), each a number or [E] tensor. fp8: static scales, or one for both;
            None takes amax/448 of every row. nvfp4: global multipliers, None is 1.
        device: where the layer shall live; by default where w2 is.
        backend: back end for calls that say "auto".

    Raises:
        InvalidCall: a malformed argument, or scales that are NaN, infinite or negative.
    """
    if activations not in ACTIVATIONS:
        raise invalid("activations", f"one of {ACTIVATIONS}", repr(activations))
    if gate_up not in GATE_UP:
        raise invalid("gate_up", f"one of {GATE_UP}", repr(gate_up))
    check_backend(backend, BACKENDS)
    place = check_device(device)
    p2 = pack_checked(w2, "w2", activations, place, backend)
    place = p2.device if place is None else place
    order = gate_up if _is_gated(w13, p2) else "plain"
    p13 = pack_checked(w13, "w13", activations, place, backend, order)
    _check_pair(p13, p2, activations)
    if p13.layout != p2.layout:
        # a packed layout refused one of them
        p13, p2 = p13.in_rows(), p2.in_rows()
    check_dense(p2, activations)
    scale1, scale2 = _input_scales(input_scale, activations, p2.shape[0], place)
    return PreparedMoE(
        w13=p13,
        w2=p2,
        b13=_bias("b13", b13, p13, place),
        b2=_bias("b2", b2, p2, place),
        input_scale1=scale1,
        input_scale2=scale2,
        activations=activations,
        gate_up=gate_up,
        backend=backend,
    )


def _is_gated(w13: QuantizedTensor | torch.Tensor, w2: PackedWeight) -> bool:
    """w13 has two rows for each column of w2; whatever else it is, is checked later."""
    return getattr(w13, "ndim", 0) == 3 and w13.shape[1] == 2 * w2.shape[2]


def _check_pair(w13: PackedWeight, w2: PackedWeight, activations: str) -> None:
    experts, hidden, inter = w2.shape
    shapes = [(experts, 2 * inter, hidden), (experts, inter, hidden)]
    if w13.shape not in shapes:
        want = f"shape {list(shapes[0])} (gated) or {list(shapes[1])} for w2 {list(w2.shape)}"
        raise invalid("w13", want, list(w13.shape))
    if (w13.format, w13.group_size) != (w2.format, w2.group_size):
        want = f"the format of w13, {w13.format} with groups of {w13.group_size}"
        raise invalid("w2", want, f"{w2.format} with groups of {w2.group_size}")
    block = {"nvfp4": 16, "mxfp4": 32}.get(activations, 1)
    if hidden % block or inter % block:
        want = f"hidden and intermediate in multiples of {block} for {activations!r}"
        raise invalid("activations", want, f"hidden {hidden}, intermediate {inter}")


def _bias(
    name: str, bias: torch.Tensor | None, weight: PackedWeight, device: torch.device
) -> torch.Tensor | None:
    if bias is None:
        return None
    if not isinstance(bias, torch.Tensor) or not bias.dtype.is_floating_point:
        got = bias.dtype if isinstance(bias, torch.Tensor) else type(bias).__name__
        raise invalid(name, "a floating point tensor", got)
    if tuple(bias.shape) != weight.shape[:2]:
        raise invalid(name, f"shape {list(weight.shape[:2])}", list(bias.shape))
    return bias.detach().to(device, torch.float32).contiguous()


def _input_scales(
    given: Scale | tuple[Scale, Scale] | None, activations: str, experts: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if activations not in ("fp8", "nvfp4"):
        if given is not None:
            raise invalid("input_scale", f"None for activations={activations!r}", repr(given))
        return None, None
    if given is None:
        if activations == "fp8":
            return None, None
        given = (1.0, 1.0)
    elif not isinstance(given, (tuple, list)):
        if activations == "nvfp4":
            raise invalid("input_scale", "a pair (FC1, FC2)", repr(given))
        given = (given, given)
    if len(given) != 2:
        raise invalid("input_scale", "a pair (FC1, FC2)", f"{len(given)} values")
    # the quantiser of nvfp4 divides by the multiplier
    least = nvfp4.GLOBAL_MIN if activations == "nvfp4" else 0.0
    scales = [_expanded(s, experts, device, least) for s in given]
    return scales[0], scales[1]


def _expanded(scale: Scale, experts: int, device: torch.device, least: float) -> torch.Tensor:
    """A number or a tensor of 1 or E values -> float32 [E]."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.Tensor)):
        raise invalid("input_scale", "numbers or tensors", type(scale).__name__)
    s = torch.as_tensor(scale)
    if s.is_complex() or s.numel() not in (1, experts) or s.ndim > 1:
        raise invalid("input_scale", f"a number or shape [{experts}]", list(s.shape))
    s = s.detach().to(torch.float32).reshape(-1)
    if s.device.type != "meta" and not bool((torch.isfinite(s) & (s > 0) & (s >= least)).all()):
        raise invalid("input_scale", f"finite values above {least:.3g}", s.tolist())
    return s.to(device).expand(experts).contiguous()
