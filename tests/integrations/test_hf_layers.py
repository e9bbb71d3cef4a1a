"""Single layers: the experts of several model families, and the gated delta rule."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.17")

from torch import nn
from transformers import activations
from transformers.integrations.moe import use_experts_implementation
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import (
    OpenAIPrivacyFilterExperts,
)
from transformers.models.qwen3_next import modeling_qwen3_next

from cutemoe import GeGLU, InvalidCall, ReLU2, SwiGLU, Unsupported
from cutemoe.integrations import hf, hf_experts, hf_gate, hf_gdn
from tests.close import assert_same, assert_within
from tests.integrations.hf_models import MODELS, prompt, stepwise_logits

E, H, INTER, T, K = 4, 64, 32, 13, 3
GPT_OSS = SwiGLU(alpha=1.702, beta=1.0, limit=7.0)


def config(**changes: Any) -> SimpleNamespace:
    """What the classes below read, under all the names they use."""
    counts = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), E)
    widths = dict.fromkeys(("intermediate_size", "moe_intermediate_size"), INTER)
    rest = {"hidden_size": H, "hidden_act": "silu", "moe_latent_size": None}
    more = {"mlp_hidden_act": "relu2", "swiglu_limit": 2.0, "swiglu_alpha": 1.25}
    run = {"_experts_implementation": "cutemoe"}
    return SimpleNamespace(**(counts | widths | rest | more | run | changes))


def filled(layer: nn.Module) -> Any:
    torch.manual_seed(0)
    for p in layer.parameters():
        nn.init.normal_(p, std=1.0 if p.ndim == 2 else 0.3)
    return layer.to(torch.bfloat16).requires_grad_(False)


# fixed in the class up to transformers 5.17, read from the configuration later
GPT_OSS_SIZES = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}
LAYERS: dict[str, tuple[Any, Any, str]] = {
    "gpt_oss": (lambda: GptOssExperts(config(**GPT_OSS_SIZES)), GPT_OSS, "interleaved"),
    "privacy_filter": (
        lambda: OpenAIPrivacyFilterExperts(config(**GPT_OSS_SIZES)),
        GPT_OSS,
        "gate_up",
    ),
    "minimax_m3": (lambda: MiniMaxM3VLExperts(config()), SwiGLU(1.25, 1.0, 2.0), "gate_up"),
    "deepseek_v4": (lambda: DeepseekV4Experts(config()), SwiGLU(limit=2.0), "gate_up"),
    "mixtral": (lambda: MixtralExperts(config()), SwiGLU(), "gate_up"),
    "gelu": (lambda: MixtralExperts(config(hidden_act="gelu")), GeGLU(), "gate_up"),
    "gelu_tanh": (
        lambda: MixtralExperts(config(hidden_act="gelu_pytorch_tanh")),
        GeGLU("tanh"),
        "gate_up",
    ),
    "quick_gelu": (
        lambda: MixtralExperts(config(hidden_act="quick_gelu")),
        SwiGLU(alpha=1.702),
        "gate_up",
    ),
    "nemotron_h": (lambda: NemotronHExperts(config()), ReLU2(), "gate_up"),
}


def fields(activation: Any) -> Any:
    return type(activation), vars(activation)


@pytest.mark.parametrize("name", LAYERS)
def test_a_gate_is_recognised(name: str) -> None:
    make, activation, rows = LAYERS[name]
    found, order = hf_gate.recognise(name, make())
    assert fields(found) == fields(activation) and order == rows


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_its_own_experts_do(name: str) -> None:
    layer = filled(LAYERS[name][0]())
    x = torch.randn(T, H).to(torch.bfloat16)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    weights = torch.rand(T, K).to(torch.bfloat16)
    got = layer(x, ids, weights)
    layer.config._experts_implementation = "eager"
    peer = layer(x, ids, weights)
    oracle = copy.deepcopy(layer).double()(x.double(), ids, weights.double())
    assert_within(got, peer.to(x.dtype), oracle.double(), name)


def with_exact_sums(layer: Any, dtype: torch.dtype) -> Any:
    """The layer with weights whose products add up to the same number in any order.

    w13 holds multiples of 1/4, and w2 one value in each row. x of 1/8 then gives h of 9 bits.
    """
    layer = filled(layer).to(dtype)
    for name, p in layer.named_parameters():
        if p.ndim == 3 and name != "down_proj":
            p.copy_(torch.randint(-2, 3, p.shape) / 4)
        elif p.ndim == 3:
            rows = p.transpose(1, 2) if layer.is_transposed else p
            kept = torch.zeros(rows.shape, dtype=torch.bool)
            kept.scatter_(2, torch.randint(0, rows.shape[2], (*rows.shape[:2], 1)), True)
            rows.masked_fill_(~kept, 0.0)
    return layer


@pytest.mark.parametrize("wide", [True, False], ids=["float32", "as_x"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_a_dense_layer_rounds_where_transformers_own_do(
    name: str, dtype: torch.dtype, wide: bool
) -> None:
    layer = with_exact_sums(LAYERS[name][0](), dtype)
    x = (torch.randint(-16, 17, (T, H)) / 8).to(dtype)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    weights = torch.rand(T, K).to(torch.float32 if wide else dtype)
    got = layer(x, ids, weights)
    for implementation in ("grouped_mm", "batched_mm"):
        layer.config._experts_implementation = implementation
        assert_same(got, layer(x, ids, weights), implementation)


def test_a_gate_of_another_kind_is_refused() -> None:
    class ClampsAfter(DeepseekV4Experts):
        def _apply_gate(self: Any, x: torch.Tensor) -> torch.Tensor:
            gate, up = x.chunk(2, dim=-1)
            return self.act_fn(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)

    no_gate = NemotronHExperts(config(mlp_hidden_act="relu"))
    learned = MixtralExperts(config())
    learned.act_fn = activations.ACT2FN["sigmoid"]
    for layer in (ClampsAfter(config()), no_gate, learned):
        with pytest.raises(Unsupported, match=rf"here: the gate of {type(layer).__name__}"):
            hf_gate.recognise("here", layer)


def test_a_norm_behind_the_experts_is_refused() -> None:
    layer = MixtralExperts(config())
    layer.__dict__["has_post_expert_norm"] = True
    with pytest.raises(Unsupported, match="here: MixtralExperts has a norm behind its experts"):
        hf_gate.recognise("here", layer)


def test_gates_of_unseen_classes_are_told_by_what_they_compute() -> None:
    class Swapped(nn.Module):
        def __init__(self, _: Any) -> None:
            super().__init__()

        def forward(self) -> None: ...

        def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
            up, gate = x.chunk(2, dim=-1)
            return nn.functional.silu(gate) * up

    layer = use_experts_implementation(Swapped)(config())
    assert hf_gate.recognise("here", layer)[1] == "up_gate"


@pytest.mark.parametrize("form", [None, "mxfp4"])
def test_experts_of_other_ranks_add_nothing(form: str | None) -> None:
    layer = filled(GptOssExperts(config()))
    if form is not None:
        hf_experts.pack("here", layer, form, None, "bf16", "auto")
    x = torch.randn(T, H).to(torch.bfloat16)
    ids = torch.randint(0, E, (T, K))
    weights = torch.rand(T, K)
    gone = torch.rand(T, K) < 0.4
    gone[0] = True
    want = layer(x, ids, weights.masked_fill(gone, 0.0))
    got = layer(x, ids.masked_fill(gone, E), weights)
    assert_same(got, want)
    assert not got[0].any()


def test_no_tokens_give_no_rows() -> None:
    layer = filled(MixtralExperts(config()))
    out = layer(torch.zeros(0, H, dtype=torch.bfloat16), torch.zeros(0, K, dtype=torch.long),
                torch.zeros(0, K))  # fmt: skip
    assert out.shape == (0, H)


def test_group_size_and_activations_reach_the_weights() -> None:
    model = hf.quantize_experts_(MODELS["qwen3_next"](), "int4", group_size=32, activations="fp8")
    layers: Any = hf_experts.layers(model)
    for _, layer in layers:
        moe = layer.cutemoe_packed.moe
        assert (moe.w13.group_size, moe.activations) == (32, "fp8")
    assert torch.isfinite(stepwise_logits(model, prompt(), 6)).all()
    with pytest.raises(InvalidCall, match="group_size: expected one of"):
        hf.quantize_experts_(MODELS["qwen3_next"](), "int4", group_size=48)


# gated delta rule ---------------------------------------------------------------------------------


def rule_inputs(steps: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(steps)
    batch, heads, dk, dv = 2, 4, 32, 48

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "query": normal(batch, steps, heads, dk).to(dtype),
        "key": normal(batch, steps, heads, dk).to(dtype),
        "value": normal(batch, steps, heads, dv).to(dtype),
        "g": -normal(batch, steps, heads).exp(),
        "beta": normal(batch, steps, heads).sigmoid().to(dtype),
        "initial_state": normal(batch, heads, dk, dv),
    }


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_rule_is_that_of_transformers(steps: int, normalise: bool) -> None:
    given = rule_inputs(steps)
    if not normalise:
        given["key"] *= given["key"].shape[-1] ** -0.5
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": normalise, "cu_seqlens": None}
    theirs = modeling_qwen3_next.torch_recurrent_gated_delta_rule
    peer, peer_state = theirs(**copy.deepcopy(given), **options)
    own = copy.deepcopy(given)
    out, state = hf_gdn.gated_delta_rule(**own, **options, rounding="eager")
    assert_same(out, peer)
    assert_same(own["initial_state"], peer_state)
    out, state = hf_gdn.gated_delta_rule(**given, **options)
    assert state is not None and state is given["initial_state"]
    fresh = rule_inputs(steps)
    if not normalise:
        fresh["key"] *= fresh["key"].shape[-1] ** -0.5
    want, want_state = token_loop(**{n: t.double() for n, t in fresh.items()}, l2norm=normalise)
    assert_within(out, peer, want, "output")
    assert_within(state, peer_state, want_state, "state")


def token_loop(query: Any, key: Any, value: Any, g: Any, beta: Any, initial_state: Any,
               l2norm: bool) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The rule in float64, token by token; the state is [B, H, Dk, Dv]."""
    if l2norm:
        query, key = (x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt() for x in (query, key))
    query, state, outs = query * query.shape[-1] ** -0.5, initial_state, []
    for t in range(query.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        error = value[:, t] - torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        update = beta[:, t][..., None] * error
        state = state + key[:, t][..., None] * update[..., None, :]
        outs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]))
    return torch.stack(outs, 1), state


def test_a_state_nobody_asks_for_is_not_written() -> None:
    given = rule_inputs(1)
    before = given["initial_state"].clone()
    wanted, _ = hf_gdn.gated_delta_rule(**copy.deepcopy(given), output_final_state=True)
    out, state = hf_gdn.gated_delta_rule(**given)
    assert state is None
    assert_same(given["initial_state"], before)
    assert_same(out, wanted)


def test_no_state_is_a_state_of_zeros() -> None:
    given = rule_inputs(3)
    given["initial_state"].zero_()
    want, state = hf_gdn.gated_delta_rule(**given, output_final_state=True)
    given["initial_state"] = None
    out, fresh = hf_gdn.gated_delta_rule(**given, output_final_state=True)
    assert_same(out, want)
    assert fresh is not None and state is not None
    assert_same(fresh, state)


def test_decoding_updates_the_cache_in_place() -> None:
    model, tokens = hf.patch(MODELS["qwen3_next"](), experts=False), prompt()
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
        state = cache.layers[0].recurrent_states[0]
        before = state.clone()
        model(tokens[:, :1], past_key_values=cache, use_cache=True)
    assert cache.layers[0].recurrent_states[0] is state
    assert not torch.equal(state, before)


def test_hooks_of_accelerate_stay_around_a_patched_layer() -> None:
    model, tokens = MODELS["qwen3_next"](), prompt()
    layer = model.model.layers[0].linear_attn
    calls = []
    layer._hf_hook, layer._old_forward = object(), layer.forward

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return layer._old_forward(*args, **kwargs)

    layer.forward = hooked
    old = layer._old_forward
    with hf.patched(model, experts=False):
        assert layer.forward is hooked and layer._old_forward != old
        stepwise_logits(model, tokens, 10)
    assert len(calls) == 2 and layer.forward is hooked and layer._old_forward == old
