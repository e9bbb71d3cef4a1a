"""How close is close enough: the one tolerance rule of the tests, and bit equality.

`assert_within`: the error of a kernel against float64 is at most twice the error of the torch path
in the same dtypes, plus one ulp of the output dtype; for the worst element and for the root mean
square. No test chooses a tolerance of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Errors:
    """Errors against float64 of a kernel and of the torch path it is compared with."""

    max_kernel: float
    max_torch: float
    rms_kernel: float
    rms_torch: float


def ulp(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64: the distance between neighbours of `dtype` at each value."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(value.abs().clamp(min=info.smallest_normal)).exponent
    return torch.ldexp(torch.full_like(value, info.eps), exponent - 1)


def assert_within(
    kernel: torch.Tensor, same_dtype: torch.Tensor, oracle: torch.Tensor, what: str = "output"
) -> Errors:
    """The tolerance rule.

    Args:
        kernel: what is tested.
        same_dtype: the torch path on the same inputs, with the roundings of the same dtypes.
        oracle: float64, from the same inputs.
        what: name for the message.
    """
    dtype = kernel.dtype
    assert oracle.dtype == torch.float64, f"{what}: the oracle must be float64"
    assert dtype == same_dtype.dtype, f"{what}: {dtype} is compared with {same_dtype.dtype}"
    shapes = {tuple(t.shape) for t in (kernel, same_dtype, oracle)}
    assert len(shapes) == 1, f"{what}: shapes differ: {shapes}"
    oracle = oracle.cpu()
    got, peer = kernel.detach().cpu().double(), same_dtype.detach().cpu().double()
    if got.numel() == 0:
        return Errors(0.0, 0.0, 0.0, 0.0)
    # a value beyond the range of the dtype is an infinity there
    want = torch.where(torch.isinf(oracle.to(dtype)), oracle.to(dtype).double(), oracle)
    odd = _checked_specials(got, peer, want, what)
    want, got, peer = (t.masked_fill(odd, 0.0) for t in (want, got, peer))
    slack = ulp(want, dtype)
    e_got, e_peer = (got - want).abs(), (peer - want).abs()
    over = e_got - slack
    worst = int(over.argmax())
    found = Errors(float(e_got.max()), float(e_peer.max()), _rms(e_got), _rms(e_peer))
    assert over.flatten()[worst] <= 2 * e_peer.max(), (
        f"{what}: error {e_got.flatten()[worst]:.4g} at {_where(worst, got.shape)} (got "
        f"{got.flatten()[worst]:.8g}, want {want.flatten()[worst]:.8g}) is over 2 x "
        f"{found.max_torch:.4g} + one ulp, {slack.flatten()[worst]:.4g}"
    )
    assert found.rms_kernel <= 2 * found.rms_torch + _rms(slack), (
        f"{what}: rms error {found.rms_kernel:.4g} is over 2 x {found.rms_torch:.4g} + "
        f"one ulp, {_rms(slack):.4g}"
    )
    return found


def assert_same(
    got: torch.Tensor, want: torch.Tensor, what: str = "output", *, signed_zeros: bool = False
) -> None:
    """Same dtype, shape and values; any NaN equals any NaN. Names the first difference.

    `signed_zeros` also tells +0 from -0, which sums in another order may swap.
    """
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, expected {want.dtype}"
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    a, b = got.detach().cpu(), want.detach().cpu()
    if a.dtype.is_floating_point:
        a, b = a.double(), b.double()
        same = _equal(a, b)
        if signed_zeros:
            same &= torch.isnan(a) | (torch.signbit(a) == torch.signbit(b))
    else:
        same = a == b
    if not bool(same.all()):
        wrong = (~same).flatten().nonzero().flatten()
        first = int(wrong[0])
        raise AssertionError(
            f"{what}: {len(wrong)} of {a.numel()} differ, the first at {_where(first, a.shape)}: "
            f"got {a.flatten()[first].item()!r}, want {b.flatten()[first].item()!r}"
        )


def _checked_specials(
    got: torch.Tensor, peer: torch.Tensor, want: torch.Tensor, what: str
) -> torch.Tensor:
    """Where any of the three is not finite; the kernel agrees there with the oracle or torch."""
    odd = ~(torch.isfinite(got) & torch.isfinite(peer) & torch.isfinite(want))
    wrong = odd & ~(_equal(got, want) | _equal(got, peer))
    if bool(wrong.any()):
        i = int(wrong.flatten().nonzero()[0])
        raise AssertionError(
            f"{what}: {got.flatten()[i].item()} at {_where(i, got.shape)}, where the oracle has "
            f"{want.flatten()[i].item()} and torch {peer.flatten()[i].item()}"
        )
    return odd


def _equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a == b) | (torch.isnan(a) & torch.isnan(b))


def _rms(t: torch.Tensor) -> float:
    return float(t.square().mean().sqrt())


def _where(flat: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), shape))
