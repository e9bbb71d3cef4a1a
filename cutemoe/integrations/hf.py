"""transformers models on cutemoe: experts of any model that dispatches them, gated delta nets.

```python
from cutemoe.integrations import hf

hf.quantize_experts_(model, format="mxfp4")   # experts in place; the dense parameters are freed
hf.patch(model)                               # gated delta net decoding; dense experts if any
model.generate(...)                           # with assistant_model= as well
hf.unpatch(model)                             # the model as it was
```

Importing this module also registers the experts implementation "cutemoe", so
`from_pretrained(..., experts_implementation="cutemoe")` and
`model.set_experts_implementation("cutemoe")` work; the experts are then prepared at their first
call. Router, shared experts, attention and the prompt of gated delta nets stay transformers'.
Inference only, bfloat16 or float16.

Saving: dense models save as ever. `save_pretrained` of a quantized model writes its packed experts,
which are `experts.cutemoe_packed.<weight>_blocks` and `_scales` in a state dict. Where this module
is imported, `from_pretrained` loads such a checkpoint; `hf.load` also loads gpt-oss's own.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any, TypeVar

try:
    import transformers
except ImportError as error:
    raise ImportError(
        "cutemoe.integrations.hf needs transformers 5.17 or newer: pip install 'cutemoe[hf]'"
    ) from error

import torch
from transformers import PreTrainedModel

from cutemoe.errors import invalid
from cutemoe.integrations import hf_experts, hf_gdn

__all__ = [
    "FORMATS",
    "IMPLEMENTATION",
    "dequantize_experts_",
    "load",
    "patch",
    "patched",
    "quantize_experts_",
    "unpatch",
]


def _check_version(version: str) -> None:
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (5, 17):
        raise ImportError(
            f"cutemoe.integrations.hf needs transformers 5.17 or newer, got {version}: "
            "pip install --upgrade 'cutemoe[hf]'"
        )


_check_version(transformers.__version__)
# older versions lack what these import
from transformers.integrations.moe import ExpertsInterface  # noqa: E402

from cutemoe.integrations import hf_checkpoint, hf_speculation  # noqa: E402
from cutemoe.integrations.hf_checkpoint import IMPLEMENTATION, load  # noqa: E402

FORMATS = ("mxfp4", "nvfp4", "int4")
ROUNDING = ("eager", "fused")
_BEFORE = "_cutemoe_experts_before"

Model = TypeVar("Model", bound=PreTrainedModel)

ExpertsInterface.register(IMPLEMENTATION, hf_experts.experts_forward)


def patch(
    model: Model,
    *,
    experts: bool = True,
    gdn: bool = True,
    max_draft_tokens: int = hf_speculation.MAX_DRAFT_TOKENS,
    rounding: str = "eager",
    backend: str = "auto",
) -> Model:
    """Lets a model's experts and gated delta nets run on cutemoe, in place, and only that model's.

    Dense experts run on the model's own parameters, as they are at each call. Where the layer
    stores them transposed (gpt-oss), they are laid out once in the order cutemoe reads, one layer
    at a time; shapes and values stay, and so does the memory taken. Experts quantized with
    `quantize_experts_` run as they are. Gated delta nets decode with `cutemoe.gdn_decode`, which
    updates the states of the model's cache in place; their prompts stay transformers'.
    `generate(..., assistant_model=draft)` then works on a model with gated delta nets, whose tokens
    `cutemoe.gdn_verify` verifies; a draft model with gated delta nets is patched as well.
    transformers keeps the experts implementation in `model.config`: models that share one
    configuration object share it too.

    Args:
        model: a transformers model in bfloat16 or float16.
        experts: whether to take the experts.
        gdn: whether to take the gated delta nets.
        max_draft_tokens: the longest window of tokens that assisted generation can take back, at
            least `num_assistant_tokens` + 1.
        rounding: of dense experts and of decoding, as in `cutemoe.fused_moe` and
            `cutemoe.gdn_decode`. "eager" rounds where transformers does, its experts being those of
            "grouped_mm" or "batched_mm", so that the tokens stay those of the unmodified model.
            "fused" rounds less, and is faster for gated delta nets. Quantized experts and assisted
            generation have nothing to equal, and are "fused".
        backend: as in `cutemoe.fused_moe`.

    Returns:
        The model.

    Raises:
        InvalidCall: the model has nothing of what is asked for, or another dtype.
        Unsupported: a layer computes what cutemoe does not; the message names it.
    """
    _check_model(model)
    if not experts and not gdn:
        raise invalid("gdn", "True where experts is False", gdn)
    if not isinstance(max_draft_tokens, int) or max_draft_tokens < 1:
        raise invalid("max_draft_tokens", "an integer of at least 1", repr(max_draft_tokens))
    if rounding not in ROUNDING:
        raise invalid("rounding", f"one of {ROUNDING}", repr(rounding))
    moe = hf_experts.layers(model) if experts else []
    nets = hf_gdn.layers(model) if gdn else []
    if not moe and not nets:
        wanted = [what for what, on in (("experts", experts), ("gated delta nets", gdn)) if on]
        raise invalid("model", f"a model with {' or '.join(wanted)}", type(model).__name__)
    for name, layer in moe:
        hf_experts.check_dense(name, layer)
    for name, layer in moe:
        hf_experts.prepare_dense(name, layer, backend, rounding)
    for _, layer in nets:
        hf_gdn.patch_layer(layer, backend, rounding)
    if nets:
        hf_speculation.patch_model(model, max_draft_tokens)
    if moe:
        _switch_on(model)
    return model


def unpatch(model: Model) -> Model:
    """Undoes `patch`: the experts implementation of before, and the layers' own forwards.

    Quantized experts stay what they are; `dequantize_experts_` gives them dense weights.
    """
    _check_model(model)
    layers = [layer for _, layer in hf_experts.layers(model)]
    for layer in layers:
        hf_experts.forget_dense(layer)
    for _, layer in hf_gdn.layers(model):
        hf_gdn.unpatch_layer(layer)
    hf_speculation.unpatch_model(model)
    if not any(hf_experts.is_packed(layer) for layer in layers):
        _switch_off(model)
    return model


@contextlib.contextmanager
def patched(model: Model, **options: Any) -> Iterator[Model]:
    """`patch(model, **options)` for the length of a with statement, and `unpatch` at its end."""
    patch(model, **options)
    try:
        yield model
    finally:
        unpatch(model)


def quantize_experts_(
    model: Model,
    format: str = "mxfp4",
    *,
    group_size: int | None = None,
    activations: str | None = None,
    backend: str = "auto",
) -> Model:
    """Quantizes the experts of a model in place and frees their dense parameters, layer by layer.

    Args:
        model: a transformers model with experts, on the device it will run on.
        format: "mxfp4", "nvfp4" (one global scale an expert) or "int4".
        group_size: int4's values per scale, 128 (default), 64 or 32.
        activations: as in `cutemoe.prepare_moe`; by default the dtype of the model.
        backend: as in `cutemoe.fused_moe`.

    Returns:
        The model, whose experts now run on cutemoe. `patch` adds the gated delta nets.
        `save_pretrained` and the state dict hold the packed weights.

    Raises:
        InvalidCall: a model without experts or with quantized ones, an unknown format, or weights
            whose rows are no whole number of groups. Nothing is changed then.
        Unsupported: a layer computes what cutemoe does not.
    """
    _check_model(model)
    if format not in FORMATS:
        raise invalid("format", f"one of {', '.join(map(repr, FORMATS))}", repr(format))
    layers = _experts(model)
    chosen = [
        hf_experts.check_quantizable(name, layer, format, group_size, activations)
        for name, layer in layers
    ]
    for (name, layer), numbers in zip(layers, chosen, strict=True):
        hf_experts.pack(name, layer, format, group_size, numbers, backend)
    hf_checkpoint.mark(model, format, group_size, activations)
    _switch_on(model)
    return model


def dequantize_experts_(model: Model, dtype: torch.dtype | None = None) -> Model:
    """Gives quantized experts dense parameters with their quantized values, in place.

    Args:
        model: a model that went through `quantize_experts_`.
        dtype: of the new parameters, which want no gradient; by default that of the old ones.

    Returns:
        The model with the experts implementation it had before; gated delta nets stay patched.

    Raises:
        InvalidCall: no quantized experts.
    """
    _check_model(model)
    packed = [layer for _, layer in _experts(model) if hf_experts.is_packed(layer)]
    if not packed:
        raise invalid("model", "quantized experts", f"dense ones in {type(model).__name__}")
    for layer in packed:
        hf_experts.unpack(layer, dtype)
    hf_checkpoint.unmark(model)
    _switch_off(model)
    return model


def _check_model(model: object) -> None:
    if not isinstance(model, PreTrainedModel):
        raise invalid("model", "a transformers.PreTrainedModel", type(model).__name__)


def _experts(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    layers = hf_experts.layers(model)
    if not layers:
        raise invalid(
            "model", "a model whose experts transformers dispatches", type(model).__name__
        )
    return layers


def _switch_on(model: PreTrainedModel) -> None:
    if _BEFORE not in model.__dict__:
        model.__dict__[_BEFORE] = model.get_experts_implementation()
    model.set_experts_implementation(IMPLEMENTATION)


def _switch_off(model: PreTrainedModel) -> None:
    before = model.__dict__.pop(_BEFORE, None)
    if before is not None:
        model.set_experts_implementation(before)
