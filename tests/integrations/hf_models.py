"""Random models of two layer kinds, small enough for a CPU: gpt-oss and Qwen3-Next."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

VOCABULARY = 64
# logits of unit size from 128 normalised values
INIT = 0.1


def gpt_oss(
    seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> GptOssForCausalLM:
    """Two layers (one with a sliding window), 8 experts, 3 a token, biases, interleaved rows."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "initializer_range": INIT,
        "sliding_window": 8,
    }
    model: Any = GptOssForCausalLM(GptOssConfig(**(sizes | changes)))
    for layer in model.model.layers:
        # transformers initialises biases with zeros
        for name in ("gate_up_proj_bias", "down_proj_bias"):
            torch.nn.init.normal_(getattr(layer.mlp.experts, name), std=0.3)
    return model.to(dtype).eval()


def qwen3_next(
    seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Qwen3NextForCausalLM:
    """Two gated delta nets around one attention layer, 16 experts, 4 a token, a shared one."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "initializer_range": INIT,
    }
    model: Any = Qwen3NextForCausalLM(Qwen3NextConfig(**(sizes | changes)))
    return model.to(dtype).eval()


MODELS: dict[str, Any] = {"gpt_oss": gpt_oss, "qwen3_next": qwen3_next}


def prompt(seed: int = 0, batch: int = 2, length: int = 11) -> torch.Tensor:
    """Token ids [batch, length]."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(0, VOCABULARY, (batch, length), generator=generator)


def float64(model: Any) -> Any:
    """The same model with float64 parameters and transformers' own experts."""
    wide = copy.deepcopy(model).double()
    wide.set_experts_implementation("eager")
    return wide


@torch.no_grad()
def stepwise_logits(model: Any, tokens: torch.Tensor, first: int) -> torch.Tensor:
    """Logits [B, S - first + 1, V]: a prompt of `first` tokens, then the others one at a time."""
    out = model(tokens[:, :first], use_cache=True)
    parts = [out.logits[:, -1:]]
    for position in range(first, tokens.shape[1]):
        out = model(
            tokens[:, position : position + 1], past_key_values=out.past_key_values, use_cache=True
        )
        parts.append(out.logits)
    return torch.cat(parts, dim=1)


@torch.no_grad()
def generated(model: Any, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    """What generate() appends, always 16 tokens."""
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=16,
        min_new_tokens=16,
        pad_token_id=0,
        **options,
    )
    return out[:, tokens.shape[1] :]
