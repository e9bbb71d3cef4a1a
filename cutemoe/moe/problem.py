"""Problem: all a plan may know of a MoE layer call, and the validation of the call."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cutemoe.errors import invalid
from cutemoe.gemm.problem import OUTPUTS, check_rows, check_same_device, check_tensor
from cutemoe.moe.tensors import MoETensors
from cutemoe.moe.workspace import layout_of

GATE_UP = ("gate_up", "up_gate", "interleaved")
ACTIVATIONS = ("bf16", "fp16", "fp8", "nvfp4", "mxfp4")
ROUNDING = ("fused", "eager")
IDS = {torch.int32: "int32", torch.int64: "int64"}


@dataclass(frozen=True)
class Problem:
    """A MoE layer call without its tensors.

    Attributes:
        tokens, hidden, intermediate, experts, top_k: T, H, I, E (local), K.
        gated: w13 holds gate and up rows.
        weight, group_size, layout: format of both weights, values per scale, place of the bytes.
        activations: format of both GEMM inputs, "bf16", "fp16", "fp8", "nvfp4" or
            "mxfp4".
        dtype: of x and out, "bf16" or "fp16".
        gate_up: row order of w13: gate row j and up row j are rows j and I+j ("gate_up"), I+j and
            j ("up_gate"), or 2j and 2j+1 ("interleaved").
        activation: "swiglu", "geglu", "geglu_tanh" or "relu2".
        per_expert_params: at least one of alpha, beta, limit is a tensor.
        has_limit: a clamp limit exists.
        has_b13, has_b2: biases exist.
        static_scale: input_scale1 and input_scale2 exist.
        ids: "int32" or "int64".
        expert_offset: id of the first local expert.
        deterministic: repeated calls must give the same bits.
        rounding: "fused" (float32 but for the inputs of the GEMMs and the result) or "eager" (the
            result of every operation has the dtype of x).
    """

    tokens: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    gated: bool
    weight: str
    group_size: int | None
    layout: str
    activations: str
    dtype: str
    gate_up: str
    activation: str
    per_expert_params: bool
    has_limit: bool
    has_b13: bool
    has_b2: bool
    static_scale: bool
    ids: str
    expert_offset: int
    deterministic: bool
    rounding: str

    @staticmethod
    def of(
        t: MoETensors,
        *,
        activations: str,
        gate_up: str,
        activation: str,
        expert_offset: int,
        deterministic: bool,
        rounding: str = "fused",
    ) -> Problem:
        """Validates the tensors of a call against the layer; raises InvalidCall."""
        experts, hidden, intermediate = t.w2.shape
        gated = t.w13.shape[1] == 2 * intermediate
        _check_activation(activation, gated)
        _check_x(t, hidden, activations)
        _check_rounding(rounding, activations)
        check_same_device("moe", t.w2.device, t.x)
        _check_routing(t, rounding)
        if not 0 <= expert_offset <= 2**31 - 1 - experts:
            raise invalid("expert_offset", f"0 to 2**31 - 1 - {experts}", expert_offset)
        per_expert = _check_params(t, experts)
        check_tensor("out", t.out, t.x.dtype, tuple(t.x.shape), t.x.device)
        check_rows("out", t.out, written=True)
        problem = Problem(
            tokens=t.x.shape[0],
            hidden=hidden,
            intermediate=intermediate,
            experts=experts,
            top_k=t.ids.shape[1],
            gated=gated,
            weight=t.w13.format,
            group_size=t.w13.group_size,
            layout=t.w13.layout,
            activations=activations,
            dtype=OUTPUTS[t.x.dtype],
            gate_up=gate_up,
            activation=activation,
            per_expert_params=per_expert,
            has_limit=t.limit is not None,
            has_b13=t.b13 is not None,
            has_b2=t.b2 is not None,
            static_scale=t.input_scale1 is not None,
            ids=IDS[t.ids.dtype],
            expert_offset=expert_offset,
            deterministic=deterministic,
            rounding=rounding,
        )
        _check_workspace(t, problem)
        return problem


def _check_activation(activation: str, gated: bool) -> None:
    if gated and activation == "relu2":
        raise invalid("activation", "SwiGLU() or GeGLU() for gated w13 [E, 2I, H]", "ReLU2()")
    if not gated and activation != "relu2":
        raise invalid("activation", "ReLU2() for ungated w13 [E, I, H]", repr(activation))


def _check_x(t: MoETensors, hidden: int, activations: str) -> None:
    x = t.x
    if x.dtype not in OUTPUTS:
        raise invalid("x", "bfloat16 or float16", x.dtype)
    if activations in ("bf16", "fp16") and OUTPUTS[x.dtype] != activations:
        fix = f"prepare_moe(activations={OUTPUTS[x.dtype]!r})"
        raise invalid("x", f"{activations}, the activations of moe", x.dtype, fix)
    if x.ndim != 2 or x.shape[1] != hidden:
        raise invalid("x", f"shape [tokens, {hidden}] for this moe", list(x.shape))
    check_rows("x", x)


def _check_rounding(rounding: str, activations: str) -> None:
    if rounding not in ROUNDING:
        raise invalid("rounding", f"one of {ROUNDING}", repr(rounding))
    if rounding == "eager" and activations not in ("bf16", "fp16"):
        fix = "prepare_moe(activations='bf16') or 'fp16', the dtype of x"
        raise invalid("rounding", f"'fused' for activations {activations!r}", "'eager'", fix)


def _check_routing(t: MoETensors, rounding: str) -> None:
    tokens = t.x.shape[0]
    if t.ids.dtype not in IDS:
        raise invalid("ids", "int32 or int64", t.ids.dtype)
    if t.ids.ndim != 2 or t.ids.shape[0] != tokens or t.ids.shape[1] == 0:
        raise invalid("ids", f"shape [{tokens}, top_k >= 1] for this x", list(t.ids.shape))
    check_tensor("ids", t.ids, t.ids.dtype, tuple(t.ids.shape), t.x.device)
    as_x = t.weights.dtype == t.x.dtype
    if as_x and rounding != "eager":
        fix = "weights.to(torch.float32), or rounding='eager', which takes both"
        raise invalid("weights", "torch.float32 with rounding='fused'", t.weights.dtype, fix)
    wanted = t.x.dtype if as_x else torch.float32
    check_tensor("weights", t.weights, wanted, tuple(t.ids.shape), t.x.device)
    check_rows("ids", t.ids)
    check_rows("weights", t.weights)


def _check_params(t: MoETensors, experts: int) -> bool:
    per_expert = False
    for name, value in (("alpha", t.alpha), ("beta", t.beta), ("limit", t.limit)):
        if isinstance(value, torch.Tensor):
            per_expert = True
            name = f"activation.{name}"
            check_tensor(name, value, torch.float32, (experts,), t.x.device)
            if not value.is_contiguous():
                raise invalid(name, "a contiguous tensor", f"strides {value.stride()}")
    return per_expert


def _check_workspace(t: MoETensors, problem: Problem) -> None:
    w = t.workspace
    if w is None:
        return
    if w.device != t.x.device:
        raise invalid("workspace", f"the device of x, {t.x.device}", w.device)
    needed = layout_of(problem).nbytes
    if w.numel() < needed:
        fix = f"Workspace.for_moe(moe, {problem.tokens}, {problem.top_k})"
        raise invalid("workspace", f"{needed} bytes for this call", f"{w.numel()} bytes", fix)
