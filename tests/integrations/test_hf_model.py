"""What patch, quantize_experts_ and their inverses do to a model, and what they refuse."""

from __future__ import annotations

import copy
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.17")

import transformers
from safetensors.torch import load_file, save_file

import cutemoe
from cutemoe import InvalidCall, Unsupported
from cutemoe.integrations import hf, hf_experts, hf_gdn
from tests.close import assert_same, assert_within
from tests.integrations.hf_models import MODELS, float64, generated, prompt, stepwise_logits

KINDS = sorted(MODELS)
NOT_A_MODEL: Any = torch.nn.Linear(2, 2)


def experts(model: Any) -> list[Any]:
    return [layer.mlp.experts for layer in model.model.layers]


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return stepwise_logits(model, tokens, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_unpatch_gives_every_bit_back(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, calls = MODELS[kind](), prompt(), []
    spy = cutemoe.fused_moe
    monkeypatch.setattr(hf_experts, "fused_moe", lambda *a, **k: calls.append(k) or spy(*a, **k))
    want = logits(model, tokens)
    before = {n: (p, p.stride()) for n, p in model.named_parameters()}
    how = model.get_experts_implementation()
    attributes = {n: set(m.__dict__) for n, m in model.named_modules()}
    assert hf.patch(model) is model
    assert model.get_experts_implementation()[""] == "cutemoe"
    logits(model, tokens)
    assert {k["rounding"] for k in calls} == {"eager"}
    hf.unpatch(model)
    calls.clear()
    assert_same(logits(model, tokens), want)
    assert not calls
    assert model.get_experts_implementation() == how
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == attributes
    for name, p in model.named_parameters():
        assert p is before[name][0] and p.stride() == before[name][1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_leaves_other_models_alone(kind: str) -> None:
    model, other, tokens = MODELS[kind](0), MODELS[kind](1), prompt()
    want = logits(other, tokens)
    hf.patch(model)
    assert_same(logits(other, tokens), want)
    assert other.get_experts_implementation()[""] != "cutemoe"
    assert not any(hf_gdn.is_patched(layer) for _, layer in hf_gdn.layers(other))


@pytest.mark.parametrize("kind", KINDS)
def test_patched_ends_with_its_block(kind: str) -> None:
    model, tokens = MODELS[kind](), prompt()
    want = logits(model, tokens)
    with pytest.raises(RuntimeError, match="inside"), hf.patched(model) as same:
        assert same is model
        raise RuntimeError("inside")
    assert_same(logits(model, tokens), want)


def test_dense_weights_are_not_copied() -> None:
    for kind in KINDS:
        model = hf.patch(MODELS[kind]())
        for module in experts(model):
            held = module.__dict__["_cutemoe_dense"].moe
            assert held.w13.data.data_ptr() == module.gate_up_proj.data_ptr()
            assert held.w2.data.data_ptr() == module.down_proj.data_ptr()


def test_only_what_is_asked_for_is_patched() -> None:
    model = MODELS["qwen3_next"]()
    hf.patch(model, experts=False)
    assert model.get_experts_implementation()[""] != "cutemoe"
    assert [hf_gdn.is_patched(layer) for _, layer in hf_gdn.layers(model)] == [True, True]
    hf.unpatch(model)
    hf.patch(model, gdn=False)
    assert model.get_experts_implementation()[""] == "cutemoe"
    assert not any(hf_gdn.is_patched(layer) for _, layer in hf_gdn.layers(model))


def test_the_implementation_works_without_patch() -> None:
    tokens = prompt()
    for kind in KINDS:
        model = MODELS[kind]()
        want = logits(hf.patch(copy.deepcopy(model), gdn=False), tokens)
        model.set_experts_implementation("cutemoe")
        assert_same(logits(model, tokens), want)


def test_changed_weights_are_seen() -> None:
    for kind in KINDS:
        model, donor, tokens = hf.patch(MODELS[kind](0)), MODELS[kind](1), prompt()
        logits(model, tokens)
        model.load_state_dict(donor.state_dict())
        assert_same(logits(model, tokens), logits(hf.patch(donor), tokens))
        model.to(torch.float16)
        assert_same(logits(model, tokens), logits(donor.to(torch.float16), tokens))


def test_a_copy_runs_on_its_own() -> None:
    tokens = prompt()
    for kind in KINDS:
        for prepare in (hf.patch, lambda m: hf.patch(hf.quantize_experts_(m))):
            model = prepare(MODELS[kind]())
            want = logits(model, tokens)
            twin = copy.deepcopy(model)
            with torch.no_grad():
                for p in model.parameters():
                    p.zero_()
            del model
            assert_same(logits(twin, tokens), want)


@pytest.mark.parametrize("form", hf.FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_experts_hold_the_quantized_values(kind: str, form: str) -> None:
    model = MODELS[kind]()
    dense = [{n: p.detach().clone() for n, p in m.named_parameters()} for m in experts(model)]
    size = model.get_memory_footprint()
    hf.quantize_experts_(model, form)
    names = [n for n, _ in model.named_parameters() if ".experts." in n]
    assert names == []
    saved = sum(w[n].nbytes for w in dense for n in ("gate_up_proj", "down_proj"))
    assert model.get_memory_footprint() < size - 0.7 * saved
    hf.dequantize_experts_(model, torch.float32)
    for module, before in zip(experts(model), dense, strict=True):
        for name, old in before.items():
            new = getattr(module, name)
            assert new.shape == old.shape and not new.requires_grad
            if old.ndim == 2:
                assert_same(new.detach(), old.float(), name)
                continue
            rows = old.mT if module.is_transposed else old
            want = torch.stack([cutemoe.quantize(w, form).dequantize() for w in rows])
            assert_same(new.detach(), want.mT if module.is_transposed else want, name)
    assert model.get_experts_implementation()[""] != "cutemoe"


@pytest.mark.parametrize("form", hf.FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_carries_quantized_experts(kind: str, form: str, tmp_path: Path) -> None:
    tokens = prompt()
    model, other = (hf.quantize_experts_(MODELS[kind](seed), form) for seed in (0, 1))
    state = model.state_dict()
    prefix = "model.layers.0.mlp.experts.cutemoe_packed."
    blocks = state[prefix + "gate_up_proj_blocks"]
    group = {"mxfp4": 32, "nvfp4": 16, "int4": 128}[form]
    assert blocks.dtype == torch.uint8
    assert blocks.shape[1:] == (256, 128 // group, group // 2)
    torch.save(state, tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert_same(logits(other, tokens), logits(model, tokens))


@pytest.mark.parametrize(
    "kind, form", [("gpt_oss", "mxfp4"), ("gpt_oss", "nvfp4"), ("qwen3_next", "int4")]
)
def test_quantized_models_are_saved_and_loaded(kind: str, form: str, tmp_path: Path) -> None:
    tokens, load = prompt(), transformers.AutoModelForCausalLM.from_pretrained
    MODELS[kind]().save_pretrained(tmp_path / "dense")
    model = hf.quantize_experts_(load(tmp_path / "dense"), form)
    model.save_pretrained(tmp_path / "packed")
    size = (tmp_path / "packed/model.safetensors").stat().st_size
    assert size < 0.7 * (tmp_path / "dense/model.safetensors").stat().st_size
    for again in (load(tmp_path / "packed"), hf.load(str(tmp_path / "packed"))):
        assert_same(logits(again, tokens), logits(model, tokens))
    hf.dequantize_experts_(again).save_pretrained(tmp_path / "values")
    hf.dequantize_experts_(model)
    assert_same(logits(load(tmp_path / "values"), tokens), logits(model, tokens))


def test_checkpoints_of_gpt_oss_stay_packed(tmp_path: Path) -> None:
    tokens, here = prompt(), str(tmp_path)
    hf.quantize_experts_(MODELS["gpt_oss"]()).save_pretrained(here)
    want = logits(hf.load(here), tokens)
    # the names and the configuration that gpt-oss's own checkpoints have
    state = load_file(tmp_path / "model.safetensors")
    stock = {name.replace("cutemoe_packed.", ""): t for name, t in state.items()}
    assert stock["model.layers.0.mlp.experts.gate_up_proj_blocks"].shape == (8, 256, 4, 16)
    save_file(stock, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = hf.load(here)
    assert_same(logits(model, tokens), want)
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again/model.safetensors").keys() == stock.keys()
    assert_same(logits(hf.load(str(tmp_path / "again")), tokens), want)


def test_checkpoints_with_dense_experts_are_refused(tmp_path: Path) -> None:
    here = str(tmp_path)
    MODELS["gpt_oss"]().save_pretrained(here)
    with pytest.raises(InvalidCall, match=r"path: expected .*'mxfp4' or 'cutemoe', got None"):
        hf.load(here)
    config = hf.hf_checkpoint.ExpertsConfig("mxfp4")
    with pytest.raises(InvalidCall, match=r"quantization_config: .*quantize_experts_"):
        transformers.AutoModelForCausalLM.from_pretrained(here, quantization_config=config)


def test_state_dicts_that_do_not_fit_are_named() -> None:
    model = hf.quantize_experts_(MODELS["gpt_oss"](), "mxfp4")
    state = model.state_dict()
    key = "model.layers.1.mlp.experts.cutemoe_packed.down_proj_scales"
    with pytest.raises(RuntimeError, match=r"Missing key.*down_proj_scales"):
        model.load_state_dict({k: v for k, v in state.items() if k != key})
    with pytest.raises(RuntimeError, match=r"down_proj_scales: expected torch.uint8"):
        model.load_state_dict(state | {key: state[key][:, :-1]})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gate_up_proj_blocks"):
        MODELS["gpt_oss"]().load_state_dict(state)


def test_quantized_experts_move_and_keep_their_dtypes() -> None:
    model = hf.quantize_experts_(MODELS["gpt_oss"](), "int4", group_size=32)
    before = model.state_dict()
    model.to(torch.float32)
    packed = experts(model)[0].cutemoe_packed
    assert packed.moe.w13.scale.dtype == torch.bfloat16
    model.to(torch.bfloat16)
    for name, t in model.state_dict().items():
        assert_same(t, before[name], name)
    model.to("meta")
    assert packed.moe.device.type == "meta" and packed.w2_data.device.type == "meta"


def test_quantized_experts_stay_through_patch_and_unpatch() -> None:
    tokens = prompt()
    for kind in KINDS:
        model = hf.quantize_experts_(MODELS[kind]())
        want = logits(model, tokens)
        with hf.patched(model):
            logits(model, tokens)
        assert_same(logits(model, tokens), want)
        assert model.get_experts_implementation()[""] == "cutemoe"


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_back_end_can_be_asked_for(backend: str) -> None:
    model, tokens = MODELS["gpt_oss"](num_hidden_layers=1), prompt(length=4, batch=1)
    oracle = stepwise_logits(float64(model), tokens, 3)
    peer = stepwise_logits(model, tokens, 3)
    got = stepwise_logits(hf.patch(model, backend=backend), tokens, 3)
    assert_within(got, peer, oracle, f"{backend} logits")
    with pytest.raises(InvalidCall, match="backend"):
        hf.patch(model, backend="quick")


def test_a_patched_model_refuses_gradients() -> None:
    model = hf.patch(MODELS["gpt_oss"]())
    with pytest.raises(InvalidCall, match="no_grad"):
        model(prompt())


def llama() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model: Any = transformers.LlamaForCausalLM(config)
    return model.to(torch.bfloat16)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: hf.patch(llama()), "model: .*experts or gated delta nets, got LlamaForCausalLM"),
        (lambda: hf.quantize_experts_(llama()), "model: .*experts.*got LlamaForCausalLM"),
        (lambda: hf.dequantize_experts_(llama()), "model: .*got LlamaForCausalLM"),
        (lambda: hf.patch(NOT_A_MODEL), "model: expected .*PreTrainedModel, got Linear"),
        (lambda: hf.patch(MODELS["gpt_oss"](), experts=False), "with gated delta nets, got GptOss"),
        (lambda: hf.patch(MODELS["gpt_oss"](), experts=False, gdn=False), "gdn: expected True"),
        (lambda: hf.patch(MODELS["gpt_oss"](), rounding="torch"), "rounding: .*got 'torch'"),
        (lambda: hf.quantize_experts_(MODELS["gpt_oss"](), "fp3"), "format: .*'mxfp4'.*got 'fp3'"),
        (lambda: hf.quantize_experts_(MODELS["gpt_oss"](), "fp8"), "format: .*got 'fp8'"),
        (lambda: hf.patch(MODELS["gpt_oss"]().float()), "mlp.experts: .*bfloat16.*float32"),
        (lambda: hf.quantize_experts_(MODELS["gpt_oss"]().float()), "mlp.experts: .*float32"),
        (
            lambda: hf.quantize_experts_(MODELS["gpt_oss"](intermediate_size=48)),
            "layers.0.mlp.experts.down_proj: .*multiple of 32, got 48",
        ),
        (
            lambda: hf.quantize_experts_(hf.quantize_experts_(MODELS["gpt_oss"]())),
            "dense experts, got quantized ones in model.layers.0",
        ),
        (lambda: hf.dequantize_experts_(MODELS["gpt_oss"]()), "quantized experts, got dense"),
    ],
)  # fmt: skip
def test_wrong_models_are_named(call: Any, words: str) -> None:
    with pytest.raises(InvalidCall, match=words):
        call()


def test_a_refused_model_is_unchanged() -> None:
    model = MODELS["gpt_oss"](intermediate_size=48)
    with pytest.raises(InvalidCall):
        hf.quantize_experts_(model)
    assert all(hasattr(m, "gate_up_proj") for m in experts(model))
    assert model.get_experts_implementation()[""] != "cutemoe"


def test_activations_we_do_not_compute_are_refused() -> None:
    model = MODELS["qwen3_next"](hidden_act="relu")
    for refused in (hf.patch, hf.quantize_experts_):
        with pytest.raises(Unsupported, match=r"layers.0.mlp.experts: .*hidden_act 'relu'"):
            refused(model)


def test_keys_and_values_may_differ_in_size() -> None:
    model, tokens = MODELS["qwen3_next"](2, linear_value_head_dim=64), prompt()
    want = generated(model, tokens, do_sample=False)
    assert generated(hf.patch(model, experts=False), tokens, do_sample=False).equal(want)


def test_missing_and_old_transformers_say_what_to_install(monkeypatch: Any) -> None:
    with pytest.raises(ImportError, match=r"5\.17 or newer, got 5\.16\.4.*'cutemoe\[hf\]'"):
        hf._check_version("5.16.4")
    for good in ("5.17.0", "5.18.0.dev0", "6.0"):
        hf._check_version(good)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "cutemoe.integrations.hf")
    with pytest.raises(ImportError, match=r"pip install 'cutemoe\[hf\]'"):
        importlib.import_module("cutemoe.integrations.hf")
