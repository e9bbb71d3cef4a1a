"""Checkpoints of packed experts: what from_pretrained and save_pretrained of transformers call.

A checkpoint holds the state dict of a model with packed experts, and its config.json says
`"quantization_config": {"quant_method": "cutemoe", "format": ..., "group_size": ...}`. The names of
gpt-oss's tensors, which lack the `cutemoe_packed` before the last dot, are read as well, and
written where they were read.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from cutemoe.errors import invalid
from cutemoe.integrations import hf_experts

METHOD = "cutemoe"
IMPLEMENTATION = "cutemoe"


class ExpertsConfig(QuantizationConfigMixin):
    """How the experts of a checkpoint are stored.

    Args:
        format: "mxfp4", "nvfp4" or "int4".
        group_size: int4's values per scale; the other formats have one.
        activations: as in `cutemoe.prepare_moe`; by default the dtype of the model.
        others: ignored.
    """

    def __init__(
        self,
        format: str = "mxfp4",
        group_size: int | None = None,
        activations: str | None = None,
        **others: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[reportAttributeAccessIssue]
        self.format, self.group_size, self.activations = format, group_size, activations


class ExpertsQuantizer(HfQuantizer):
    """Reads packed experts into a model."""

    quantization_config: Any

    def __init__(self, quantization_config: Any, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self.waiting: list[nn.Module] = []

    def validate_environment(self, *args: Any, **options: Any) -> None:
        """Raises InvalidCall for a checkpoint whose experts are not packed."""
        if not self.pre_quantized:
            raise invalid(
                "quantization_config",
                "None for a checkpoint with dense experts",
                type(self.quantization_config).__name__,
                "load it, then quantize_experts_(model)",
            )

    def is_serializable(self) -> bool:
        """True: the state dict has every tensor."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: inference only."""
        return False

    @property
    def is_compileable(self) -> bool:
        """True: torch.compile traces the experts."""
        return True

    def get_weight_conversions(self) -> list[WeightRenaming]:
        """gpt-oss's names -> ours."""
        weights = ("gate_up_proj", "down_proj")
        names = [f"{w}_{part}" for w in weights for part in ("blocks", "scales", "bias")]
        return [WeightRenaming(f"experts.{n}", f"experts.{hf_experts.PACKED}.{n}") for n in names]

    def _process_model_before_weight_loading(self, model: Any, **options: Any) -> None:
        c = self.quantization_config
        for name, layer in hf_experts.layers(model):
            hf_experts.await_packed(name, layer, c.format, c.group_size)
            self.waiting.append(layer)
        if not self.waiting:
            raise invalid(
                "model", "a model whose experts transformers dispatches", type(model).__name__
            )

    def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
        c, waiting = self.quantization_config, self.waiting
        self.waiting = []
        activations = c.activations or hf_experts.DTYPES.get(model.dtype, "bf16")
        for layer in waiting:
            hf_experts.adopt_packed(layer, c.format, activations, model.dtype)
        model.set_experts_implementation(IMPLEMENTATION)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for _, layer in hf_experts.layers(model):
            hf_experts.unpack(layer, dtype)
        return model


register_quantization_config(METHOD)(ExpertsConfig)
register_quantizer(METHOD)(ExpertsQuantizer)


def mark(
    model: PreTrainedModel, form: str, group_size: int | None, activations: str | None
) -> None:
    """Lets save_pretrained write the packed experts of a model as a checkpoint."""
    config = ExpertsConfig(form, group_size, activations)
    model.hf_quantizer = ExpertsQuantizer(config)  # type: ignore[reportArgumentType]
    model.config.quantization_config = config


def unmark(model: PreTrainedModel) -> None:
    """Lets save_pretrained write a dense model."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, ExpertsQuantizer):
        quantizer.remove_quantization_config(model)


def load(path: str | PathLike[str], **options: Any) -> Any:
    """Loads a checkpoint whose experts stay packed: one of gpt-oss, or one saved after quantizing.

    Args:
        path: folder, or name on the hub, of a causal language model whose config.json names the
            quantization method "mxfp4" (gpt-oss) or "cutemoe".
        options: of transformers' `from_pretrained`, such as dtype and device_map.

    Returns:
        The model, on cutemoe; `patch` adds gated delta nets.

    Raises:
        InvalidCall: another quantization method, or none.
    """
    config = options.pop("config", None) or AutoConfig.from_pretrained(path)
    stored = getattr(config, "quantization_config", None)
    stored = stored if isinstance(stored, dict) or stored is None else stored.to_dict()
    method = None if stored is None else stored.get("quant_method")
    if method not in ("mxfp4", METHOD):
        raise invalid("path", "a checkpoint quantized by 'mxfp4' or 'cutemoe'", repr(method))
    if method == "mxfp4":
        config.quantization_config = ExpertsConfig("mxfp4").to_dict()
    return AutoModelForCausalLM.from_pretrained(path, config=config, **options)
