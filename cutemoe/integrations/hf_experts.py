"""Expert layers of transformers on `cutemoe.fused_moe`, with dense or packed weights.

A layer is any module of a class decorated with transformers' `use_experts_implementation`.

Decision: dense weights stay the module's parameters, and what is prepared shares their memory.
A transposed layer (gpt-oss: [E, H, 2I]) is laid out once as [E, 2I, H]; its parameter becomes a
transposed view of that memory, with the same shape and values. Rejected: a second copy, which
doubles the model. Packed weights replace the parameters: they live in one child module.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cutemoe import InvalidCall, PreparedMoE, QuantizedTensor, fused_moe, prepare_moe, quantize
from cutemoe.errors import invalid
from cutemoe.integrations.hf_gate import Activation, recognise
from cutemoe.integrations.hf_packed import Packed

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts")
_DENSE = "_cutemoe_dense"
PACKED = "cutemoe_packed"
# values quantized at a time; the quantizer holds a few float32 copies of them
_CHUNK = 1 << 26


@dataclass(frozen=True, eq=False)
class Dense:
    """The parameters of one layer, prepared.

    Attributes:
        moe: shares the memory of the weights.
        activation: what the layer computes between its two products.
        rounding: as in `fused_moe`.
        source: what the parameters were when they were prepared.
    """

    moe: PreparedMoE
    activation: Activation
    rounding: str
    source: tuple[Any, ...]


def experts_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The weighted sum of the chosen experts, as transformers calls an experts implementation.

    Dense layers round after every operation, where transformers' own "grouped_mm" and "batched_mm"
    do (`rounding="eager"` of `fused_moe`), unless patched to round less; packed layers have nothing
    to equal and round least.

    Args:
        self: the layer.
        hidden_states: [T, H] bfloat16 or float16.
        top_k_index: [T, K]; an index outside the layer (transformers writes `num_experts` for the
            experts of other ranks) adds nothing.
        top_k_weights: [T, K] of any floating dtype. Dense layers multiply by those of the dtype of
            hidden_states as they are, and round the products to it; others become float32.

    Returns:
        [T, H] in the dtype of hidden_states.
    """
    layer = _packed(self) if is_packed(self) else _dense(self)
    rounding = layer.rounding if isinstance(layer, Dense) else "fused"
    weights = top_k_weights
    if rounding == "fused" or weights.dtype != hidden_states.dtype:
        weights = weights.to(torch.float32)
    return fused_moe(
        hidden_states,
        layer.moe,
        top_k_index,
        weights,
        activation=layer.activation,
        rounding=rounding,
    )


def layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The expert layers of a model with their names."""
    return [(name, m) for name, m in model.named_modules() if _is_layer(m)]


def is_packed(module: nn.Module) -> bool:
    """Whether a layer holds packed weights in place of its dense parameters."""
    return PACKED in module._modules


def check_dense(name: str, module: nn.Module) -> None:
    """Raises InvalidCall or Unsupported where `prepare_dense` would; changes nothing."""
    if not is_packed(module):
        recognise(name, module)
        _activations(name, module)


def prepare_dense(name: str, module: nn.Module, backend: str, rounding: str) -> None:
    """Prepares a layer's own parameters; where they are packed, only the back end changes.

    Raises:
        InvalidCall: parameters that are neither bfloat16 nor float16.
        Unsupported: a gate that no activation of cutemoe computes.
    """
    if is_packed(module):
        packed = _packed(module)
        packed.hold(replace(packed.moe, backend=backend))
    else:
        module.__dict__[_DENSE] = _prepared(name, module, backend, rounding)


def forget_dense(module: nn.Module) -> None:
    """Drops what was prepared, and gives transposed parameters the order they had."""
    if module.__dict__.pop(_DENSE, None) is not None:
        for p in _parameters(module).values():
            p.data = p.data.contiguous()


def check_quantizable(
    name: str, module: nn.Module, form: str, group_size: int | None, activations: str | None
) -> str:
    """The activations `pack` shall prepare a layer for; raises where it would, changes nothing."""
    if is_packed(module):
        got = f"quantized ones in {name}"
        raise invalid("model", "dense experts", got, "dequantize_experts_(model) first")
    recognise(name, module)
    dense = _parameters(module)
    for weight in _names(module)[::2]:
        rows = _rows(dense[weight], module)
        try:
            quantize(torch.zeros(rows.shape[-1]), form, group_size=group_size)
        except InvalidCall as error:
            raise InvalidCall(f"{name}.{weight}: {error}") from None
    return _activations(name, module) if activations is None else activations


def pack(
    name: str, module: nn.Module, form: str, group_size: int | None, activations: str, backend: str
) -> None:
    """Quantizes a layer's weights, a few experts at a time, and frees its dense parameters."""
    forget_dense(module)
    dense, (w13, _, w2, _) = _parameters(module), _names(module)
    dtype = dense[w2].dtype
    q13, q2 = (_quantized(_rows(dense[w], module), form, group_size) for w in (w13, w2))
    moe, activation = _moe(name, module, (q13, q2), dense, activations, backend)
    for parameter in dense:
        delattr(module, parameter)
    module.register_module(PACKED, Packed(moe, activation, _names(module), dtype))


def await_packed(name: str, module: nn.Module, form: str, group_size: int | None) -> None:
    """Puts empty buffers for what a checkpoint stores in place of a layer's parameters."""
    recognise(name, module)
    waiting, dense = nn.Module(), _parameters(module)
    for weight, p in dense.items():
        delattr(module, weight)
        if p.ndim == 2:
            waiting.register_buffer(weight, torch.empty_like(p))
            continue
        rows = _rows(p, module)
        one = quantize(torch.zeros(1, rows.shape[-1], device="cpu"), form, group_size=group_size)
        groups = one.scale.shape[-1]
        shape = (*rows.shape[:2], groups, one.data.shape[-1] // groups)
        parts = {"blocks": (torch.uint8, shape), "scales": (one.scale.dtype, shape[:3])}
        if one.global_scale is not None:
            parts["global_scale"] = (torch.float32, shape[:1])
        for part, (dtype, size) in parts.items():
            empty = torch.empty(size, dtype=dtype, device=p.device)
            waiting.register_buffer(f"{weight}_{part}", empty)
    # transformers would otherwise look for the parameters, to initialise them
    module.__dict__["_is_hf_initialized"] = waiting.__dict__["_is_hf_initialized"] = True
    module.register_module(PACKED, waiting)


def adopt_packed(module: nn.Module, form: str, activations: str, dtype: torch.dtype) -> None:
    """Packs what a checkpoint has put into the buffers of `await_packed`."""
    buffers: dict[str, Any] = dict(module._modules[PACKED]._buffers)  # type: ignore
    delattr(module, PACKED)
    weights = []
    for weight in _names(module)[::2]:
        blocks, scales = buffers.pop(f"{weight}_blocks"), buffers.pop(f"{weight}_scales")
        factor = buffers.pop(f"{weight}_global_scale", None)
        weights.append(QuantizedTensor(blocks.flatten(-2), scales, factor, format=form))
    name = type(module).__name__
    moe, activation = _moe(name, module, weights, buffers, activations, "auto")
    module.register_module(PACKED, Packed(moe, activation, _names(module), dtype))


def unpack(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Gives a packed layer dense parameters with the values of its packed weights."""
    packed = _packed(module)
    tensors = packed.dense(packed.dtype if dtype is None else dtype)
    delattr(module, PACKED)
    for name, t in tensors.items():
        if t.ndim == 3 and module.is_transposed:
            t = t.transpose(1, 2).contiguous()
        module.register_parameter(name, nn.Parameter(t, requires_grad=False))


def _is_layer(module: nn.Module) -> bool:
    if not all(hasattr(module, flag) for flag in _FLAGS):
        return False
    return is_packed(module) or getattr(getattr(module, "down_proj", None), "ndim", 0) == 3


def _packed(module: nn.Module) -> Packed:
    return module._modules[PACKED]  # type: ignore[reportReturnType]


def _dense(module: nn.Module) -> Dense:
    found = module.__dict__.get(_DENSE)
    if torch.compiler.is_compiling():
        if found is None:
            raise InvalidCall(
                "model: expected experts that were prepared before torch.compile, got experts that "
                "never ran (call cutemoe.integrations.hf.patch(model) first)"
            )
        return found
    if found is None or found.source != _source(module):
        how = ("auto", "eager") if found is None else (found.moe.backend, found.rounding)
        found = module.__dict__[_DENSE] = _prepared(type(module).__name__, module, *how)
    return found


@torch.inference_mode(False)
@torch.no_grad()
def _prepared(name: str, module: nn.Module, backend: str, rounding: str) -> Dense:
    activations, dense = _activations(name, module), _parameters(module)
    if module.is_transposed:
        for p in dense.values():
            if p.ndim == 3 and not p.transpose(1, 2).is_contiguous():
                p.data = p.data.transpose(1, 2).contiguous().transpose(1, 2)
    weights = [_rows(dense[w], module) for w in _names(module)[::2]]
    moe = _moe(name, module, weights, dense, activations, backend)
    return Dense(*moe, rounding, _source(module))


def _moe(
    name: str, module: nn.Module, weights: Any, biases: Any, activations: str, backend: str
) -> tuple[PreparedMoE, Activation]:
    """(w13, w2) prepared with the biases found in a dictionary, and the layer's activation."""
    activation, rows = recognise(name, module)
    b13, b2 = (biases.get(n) for n in _names(module)[1::2])
    w13, w2 = weights
    moe = prepare_moe(w13, w2, b13, b2, activations=activations, gate_up=rows, backend=backend)
    return moe, activation


def _source(module: nn.Module) -> tuple[Any, ...]:
    return tuple(
        (t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype, t.device)
        for t in _parameters(module).values()
    )


def _names(module: Any) -> tuple[str, ...]:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    return (first, f"{first}_bias", "down_proj", "down_proj_bias")


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    found = ((name, module._parameters.get(name)) for name in _names(module))
    return {name: p for name, p in found if p is not None}


def _activations(name: str, module: nn.Module) -> str:
    dtype = _parameters(module)["down_proj"].dtype
    if dtype not in DTYPES:
        raise invalid(name, "bfloat16 or float16 weights", dtype, "model.to(torch.bfloat16)")
    return DTYPES[dtype]


def _rows(weight: Any, module: Any) -> torch.Tensor:
    weight = weight.detach()
    return weight.transpose(1, 2) if module.is_transposed else weight


@torch.no_grad()
def _quantized(rows: torch.Tensor, form: str, group_size: int | None) -> QuantizedTensor:
    parts = []
    for chunk in rows.split(max(1, _CHUNK // rows[0].numel())):
        scale = None
        if form == "nvfp4":
            amax = chunk.abs().amax((1, 2)).to(torch.float32)
            scale = torch.where(amax > 0, amax / (448.0 * 6.0), 1.0)
        parts.append(quantize(chunk.contiguous(), form, group_size=group_size, global_scale=scale))
    data, scale = (torch.cat([getattr(q, part) for q in parts]) for part in ("data", "scale"))
    factors = [q.global_scale.reshape(-1) for q in parts if q.global_scale is not None]
    factor = torch.cat(factors) if factors else None
    return QuantizedTensor(data, scale, factor, format=form, group_size=group_size)
