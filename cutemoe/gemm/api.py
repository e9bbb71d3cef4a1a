"""The public grouped GEMM."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cutemoe.errors import invalid
from cutemoe.formats import QuantizedTensor
from cutemoe.gemm.plan import BACKENDS
from cutemoe.gemm.prepare import PreparedGroupedGemm, prepare_grouped_gemm
from cutemoe.gemm.problem import ACTIVATIONS, OUTPUTS, GemmProblem
from cutemoe.gemm.tensors import GemmTensors, tile_bytes
from cutemoe.gemm.weight import PackedWeight
from cutemoe.runtime.backend import Backend, choose
from cutemoe.runtime.capture import distinct
from cutemoe.runtime.device import Device
from cutemoe.runtime.op import Op, define
from cutemoe.runtime.recall import Recall
from cutemoe.runtime.replay import Again, with_scratch

__all__ = ["GROUPED_GEMM", "PreparedGroupedGemm", "grouped_gemm", "prepare_grouped_gemm"]

Weights = QuantizedTensor | PreparedGroupedGemm | torch.Tensor
_KNOWN = Recall()


def grouped_gemm(
    x: torch.Tensor,
    w: Weights,
    group_offsets: torch.Tensor,
    *,
    x_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Multiplies the rows of every group by the transposed weights of that group.

    out[r] = x_scale[r] * (x[r] @ w[g].T) with float32 sums and one rounding. R rows, G groups.

    Args:
        x: [R, Kdim] sorted by group; bf16, fp16, or float8_e4m3fn. Rows may have any stride.
        w: [G, N, Kdim]: `prepare_grouped_gemm`'s result, a QuantizedTensor, or dense of x's dtype.
        group_offsets: int32 [G+1] on the device of x, from 0 on, not decreasing; group g owns rows
            group_offsets[g] to group_offsets[g+1]. Rows from group_offsets[G] on become zero.
        x_scale: float32, [] or [R], for fp8 x; None is 1.
        out: [R, N] to write to, of x's dtype; bf16 or fp16 for fp8 x.
        backend: "auto", "cute", "triton" or "reference".

    Returns:
        out; a new one of x's dtype, bf16 for fp8 x, where none was given.

    Raises:
        InvalidCall: a malformed argument; nothing was written.
        Unsupported: no back end runs this here; the message has every reason.

    >>> x, w = torch.ones(3, 4).half(), torch.tensor([[[1, 1, 1, 1]], [[2, 2, 2, 2]]]).half()
    >>> grouped_gemm(x, w, torch.tensor([0, 1, 3], dtype=torch.int32)).tolist()
    [[4.0], [8.0], [8.0]]
    """
    t, requested, kind = None, backend, None
    if type(w) is PreparedGroupedGemm:
        weight, kind = w.weight, (w.activations, w.backend)
    else:
        t, requested = _tensors(x, w, group_offsets, x_scale, out, backend)
        weight, out = t.w, t.out
    own, weights = weight.signature
    words = (
        getattr(x, "shape", None), own, kind, requested, type(requested), x_scale is None,
        out is None,
    )  # fmt: skip
    tensors = [x, group_offsets, *weights, *[p for p in (x_scale, out) if p is not None]]
    recalls = not torch.compiler.is_compiling()
    if recalls and (found := _KNOWN.find(words, tensors)):
        return _again(*found, tensors, weight.shape[1], x, out)
    if t is None:
        t, requested = _tensors(x, w, group_offsets, x_scale, out, backend)
    call = _operands(t, requested)
    _grouped_gemm(*call)
    if recalls:
        roles = tensors if out is not None else [*tensors, t.out]
        _KNOWN.keep(words, tensors, partial(_bind, roles, *call))
    return t.out


def _operands(t: GemmTensors, requested: str) -> tuple[Any, ...]:
    """The arguments of the operator."""
    form = (t.w.format, t.w.layout, t.w.group_size)
    parts = (t.x, t.offsets, t.x_scale, t.out, t.w.data, t.w.scale, t.w.factor)
    return (*parts, *form, list(t.w.shape), requested)


def _again(
    launch: Again,
    addresses: list[int],
    tensors: list[torch.Tensor],
    n: int,
    x: torch.Tensor,
    out: torch.Tensor | None,
) -> torch.Tensor:
    """Makes a call that is known; returns out."""
    if out is None:
        out = _out(x, n)
        tensors.append(out)
        addresses.append(out.data_ptr())
    launch(tensors, addresses)
    return out


def _out(x: torch.Tensor, n: int) -> torch.Tensor:
    """What is written where no out is given."""
    dtype = x.dtype if x.dtype in OUTPUTS else torch.bfloat16
    return torch.empty(x.shape[0], n, dtype=dtype, device=x.device)


def _tensors(
    x: Any, w: Any, group_offsets: Any, x_scale: Any, out: Any, backend: Any
) -> tuple[GemmTensors, str]:
    """The tensors of a public call and the back end it asks for."""
    optional = (("x_scale", x_scale), ("out", out))
    given = [("x", x), ("group_offsets", group_offsets)]
    for name, t in given + [(name, t) for name, t in optional if t is not None]:
        check_inference_tensor(name, t)
    if not isinstance(backend, str):
        raise invalid("backend", "a name", repr(backend))
    if isinstance(w, PreparedGroupedGemm):
        if ACTIVATIONS.get(x.dtype) != w.activations:
            raise invalid("x", f"{w.activations}, the activations w was prepared for", x.dtype)
        packed = w.weight
        backend = w.backend if backend == "auto" else backend
    else:
        if isinstance(w, torch.Tensor):
            check_inference_tensor("w", w)
        packed = PackedWeight.of(w)
        data = w if isinstance(w, torch.Tensor) else w.data
        if not data.is_contiguous():
            raise invalid("w", "contiguous weights", data.stride(), "prepare_grouped_gemm")
    if out is None:
        if x.ndim != 2:
            raise invalid("x", f"shape [rows, {packed.shape[2]}]", list(x.shape))
        out = _out(x, packed.shape[1])
    return GemmTensors(x, packed, group_offsets, x_scale, out), backend


def check_inference_tensor(name: str, t: object) -> None:
    """Raises InvalidCall unless t is a tensor that asks for no gradient."""
    if not isinstance(t, torch.Tensor):
        raise invalid(name, "a torch.Tensor", type(t).__name__)
    if t.requires_grad and torch.is_grad_enabled():
        fix = "wrap the call in torch.no_grad()"
        raise invalid(name, "no gradient: there is no backward", "requires_grad=True", fix)


def _call(
    x: torch.Tensor,
    offsets: torch.Tensor,
    x_scale: torch.Tensor | None,
    out: torch.Tensor,
    data: torch.Tensor,
    scale: torch.Tensor | None,
    factor: torch.Tensor | None,
    format: str,
    layout: str,
    group_size: int | None,
    shape: list[int],
) -> tuple[GemmProblem, GemmTensors]:
    groups, n, k = shape
    w = PackedWeight(data, scale, factor, format, layout, group_size, (groups, n, k))
    t = GemmTensors(x, w, offsets, x_scale, out)
    return GemmProblem.of(t), t


def _prepared(*args: Any) -> tuple[Backend, GemmProblem, Device, GemmTensors]:
    """The back end of a call, and what it takes."""
    *call, backend = args
    problem, t = _call(*call)
    device = Device.of(t.x.device)
    return choose("grouped_gemm", BACKENDS, problem, device, backend), problem, device, t


def _run(*args: Any) -> None:
    chosen, problem, device, t = _prepared(*args)
    if problem.rows:
        chosen.run(problem, device, t)


def _bind(roles: list[torch.Tensor], *args: Any) -> Again | None:
    """What makes calls that differ from this one by the tensors in these roles alone; None of no
    rows."""
    chosen, problem, device, t = _prepared(*args)
    if not problem.rows:
        return None
    # a recorded launch takes its scratch memory from the call; no tile has fewer than 8 rows
    nbytes = tile_bytes(min(problem.groups + 1, problem.rows) + problem.rows // 8)
    scratch = torch.empty(nbytes, dtype=torch.uint8, device=t.x.device)
    again = chosen.again(problem, device, replace(t, scratch=scratch), [*roles, scratch])
    return with_scratch(again, nbytes, t.x.device)


def _fake(*args: Any) -> None:
    _call(*args[:-1])


_grouped_gemm = define(
    "grouped_gemm(Tensor x, Tensor offsets, Tensor? x_scale, Tensor(a!) out, Tensor data, "
    "Tensor? scale, Tensor? factor, str format, str layout, int? group_size, SymInt[] shape, "
    "str backend) -> ()",
    _run,
    _fake,
)


def _describe(
    x: torch.Tensor,
    w: Weights,
    group_offsets: torch.Tensor,
    *,
    x_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[GemmProblem, torch.device, str]:
    t, requested = _tensors(x, w, group_offsets, x_scale, out, backend)
    return GemmProblem.of(t), t.x.device, requested


def _bind_call(*args: Any, **options: Any) -> tuple[Again | None, list[torch.Tensor], Any]:
    given = inspect.signature(grouped_gemm).bind(*args, **options)
    given.apply_defaults()
    t, requested = _tensors(**given.arguments)
    call = _operands(t, requested)
    tensors = distinct(call)
    return _bind(tensors, *call), tensors, t.out


GROUPED_GEMM = Op("grouped_gemm", BACKENDS, _describe, _bind_call)
