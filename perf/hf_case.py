"""Models for hf_check.py: transformers' classes with real or small layer sizes, random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

GPT_OSS_20B = {
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
}
GPT_OSS_TINY = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.1,
}
QWEN3_NEXT_TINY = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "initializer_range": 0.1,
}


@dataclass(frozen=True)
class Kind:
    """A model family: its classes, and what its configuration adds to the defaults.

    Qwen3NextConfig's defaults are the sizes of Qwen3-Next-80B-A3B.
    """

    config: Callable[..., Any]
    model: Any
    real: dict[str, Any]
    tiny: dict[str, Any]


KINDS = {
    "gpt_oss": Kind(GptOssConfig, GptOssForCausalLM, GPT_OSS_20B, GPT_OSS_TINY),
    "qwen3_next": Kind(Qwen3NextConfig, Qwen3NextForCausalLM, {}, QWEN3_NEXT_TINY),
}


def build(
    name: str,
    seed: int,
    dtype: torch.dtype,
    *,
    layers: int,
    vocabulary: int,
    device: str,
    tiny: bool,
) -> Any:
    """A random model on the device; transformers zeroes gpt-oss's biases, this does not."""
    kind = KINDS[name]
    sizes = dict(kind.tiny if tiny else kind.real)
    if name == "qwen3_next":
        # every fourth layer is attention; transformers needs one at least
        every = min(4, layers)
        kinds = ("linear_attention", "full_attention")
        sizes["layer_types"] = [kinds[(i + 1) % every == 0] for i in range(layers)]
    config = kind.config(vocab_size=vocabulary, num_hidden_layers=layers, use_cache=True, **sizes)
    torch.manual_seed(seed)
    with torch.device(device):
        model = kind.model._from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter, p in model.named_parameters():
            if parameter.endswith(("gate_up_proj_bias", "down_proj_bias")):
                p.normal_(std=0.3)
    return model.eval().requires_grad_(False)
