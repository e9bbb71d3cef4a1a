"""Assisted generation on gated delta nets: the tokens of greedy decoding, states that go back."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", "5.17")

from transformers import DynamicCache

from cutemoe import InvalidCall
from cutemoe.integrations import hf, hf_gdn, hf_speculation
from tests.close import assert_same, assert_within
from tests.integrations import hf_models
from tests.integrations.hf_models import VOCABULARY, generated, prompt, qwen3_next

# CuTe's head sizes; float32, in which no two tokens of these random models tie
HEADS = {"linear_key_head_dim": 64, "linear_value_head_dim": 64}


def qwen3_5(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Two gated delta nets around one attention layer, dense."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(seed)
    config = Qwen3_5TextConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=128, num_hidden_layers=3,
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, linear_key_head_dim=32,
        linear_value_head_dim=32, linear_num_key_heads=2, linear_num_value_heads=4,
        initializer_range=hf_models.INIT,
    )  # fmt: skip
    model: Any = Qwen3_5ForCausalLM(config)
    return model.to(dtype).eval()


def wrong(target: Any) -> Any:
    """Picks the token the target likes least."""
    draft = copy.deepcopy(target)
    draft.lm_head.weight = torch.nn.Parameter(-draft.lm_head.weight.detach())
    return draft


DRAFTS: dict[str, Any] = {
    "another": lambda target: hf.patch(
        type(target)(target.config).to(target.device, target.dtype).eval(), experts=False
    ),
    "itself": lambda target: target,
    "copy": copy.deepcopy,
    "wrong": wrong,
}


def drafting(model: Any, tokens: int) -> Any:
    """The model, which drafts that many tokens however sure it is of them."""
    model.generation_config.num_assistant_tokens = tokens
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


def greedy(model: Any, tokens: torch.Tensor, **options: Any) -> list[list[int]]:
    return generated(model, tokens, do_sample=False, **options).tolist()


@pytest.mark.parametrize("drafted", [1, 4, 7])
@pytest.mark.parametrize("draft", DRAFTS)
def test_an_assistant_changes_no_token(draft: str, drafted: int, device: torch.device) -> None:
    model: Any = qwen3_next(2, torch.float32, **HEADS)
    model.to(device)
    tokens = prompt(drafted, 1, 11).to(device)
    want = greedy(model, tokens)
    hf.patch(model, experts=False)
    torch.manual_seed(drafted)
    helper = drafting(DRAFTS[draft](model), drafted)
    assert greedy(model, tokens, assistant_model=helper) == want
    assert greedy(model, tokens) == want


@pytest.mark.parametrize("seed", range(3))
def test_qwen3_5(seed: int) -> None:
    model, tokens = qwen3_5(seed), prompt(seed, 1, 9)
    want = greedy(model, tokens)
    hf.patch(model)
    for draft in (model, wrong(model)):
        assert greedy(model, tokens, assistant_model=draft) == want


def test_prompt_lookup_needs_no_draft_model() -> None:
    model = qwen3_next(2, torch.float32)
    tokens = prompt(0, 1, 5).repeat(1, 3)
    want = greedy(model, tokens)
    hf.patch(model, experts=False)
    assert greedy(model, tokens, prompt_lookup_num_tokens=3) == want


def test_a_long_prompt_keeps_the_chunked_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the last max_draft_tokens tokens of the prompt and its drafts are verified."""
    model, tokens = qwen3_next(2, torch.float32), prompt(3, 1, 40)
    want = greedy(model, tokens)
    lengths = []
    own = hf_speculation.RollbackLayer._prefill

    def counted(self: Any, new: Any, *args: Any) -> Any:
        lengths.append(new[0].shape[1])
        return own(self, new, *args)

    monkeypatch.setattr(hf_speculation.RollbackLayer, "_prefill", counted)
    hf.patch(model, experts=False, max_draft_tokens=8)
    draft = drafting(wrong(model), 5)
    assert greedy(model, tokens, assistant_model=draft) == want
    # both nets of the draft, then of the target, whose first forward holds the drafts
    assert lengths == [40 - 8] * 2 + [40 + 5 - 8] * 2


def test_unpatch_gives_the_refusal_back() -> None:
    model, tokens = qwen3_next(2, torch.float32), prompt(0, 1)
    before = set(model.__dict__)
    hf.unpatch(hf.patch(model, experts=False))
    assert set(model.__dict__) == before
    with pytest.raises(ValueError, match="stateful"):
        greedy(model, tokens, assistant_model=model)


def test_a_window_that_is_too_short_says_so() -> None:
    model, tokens = qwen3_next(2, torch.float32), prompt(0, 1)
    hf.patch(model, experts=False, max_draft_tokens=3)
    draft = drafting(wrong(model), 6)
    with pytest.raises(InvalidCall, match=r"the 3 tokens .* max_draft_tokens"):
        greedy(model, tokens, assistant_model=draft)
    for value in (0, "4"):
        with pytest.raises(InvalidCall, match="max_draft_tokens"):
            hf.patch(model, max_draft_tokens=value)  # pyright: ignore[reportArgumentType]


# the layer of the cache ---------------------------------------------------------------------------


def cache_of(model: Any, max_tokens: int, plain: Any = None) -> Any:
    cache = DynamicCache(config=model.config) if plain is None else plain
    hf_speculation.make_croppable(model, cache, max_tokens)
    return cache


def step(model: Any, tokens: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("crop_every", [1, 2])
def test_a_cropped_cache_is_that_of_the_tokens_left(crop_every: int) -> None:
    """Forwards of every length, one or two of them between crops of every length."""
    model, g = qwen3_next(2, torch.float32), torch.Generator().manual_seed(crop_every)
    wide, plain = hf_models.float64(model), copy.deepcopy(model)
    hf.patch(model, experts=False)
    cache = cache_of(model, 6)
    pieces: list[torch.Tensor] = []
    since, parts = 0, []
    for i, length in enumerate((9, 1, 4, 2, 7, 1, 1, 3, 6, 2)):
        pieces.append(torch.randint(0, VOCABULARY, (1, length), generator=g))
        since += length
        parts.append(
            (step(model, pieces[-1], cache), *(piecewise(m, pieces) for m in (plain, wide)))
        )
        if i % crop_every == crop_every - 1:
            removed = int(torch.randint(0, min(since, 6) + 1, (), generator=g))
            cache.crop(-removed)
            since, left = 0, torch.cat(pieces, 1).shape[1] - removed
            pieces = [p for p in torch.cat(pieces, 1)[:, :left].split(lengths(pieces, left), 1)]
    assert cache.get_seq_length(1) == sum(p.shape[1] for p in pieces)
    got, peer, want = (torch.cat(x, 1) for x in zip(*parts, strict=True))
    assert_within(got, peer, want, "logits")


def lengths(pieces: list[torch.Tensor], total: int) -> list[int]:
    """Those of the pieces, as far as `total` tokens reach."""
    found = []
    for p in pieces:
        found.append(min(p.shape[1], total - sum(found)))
    return [n for n in found if n > 0]


def piecewise(model: Any, pieces: list[torch.Tensor]) -> torch.Tensor:
    """Logits of the last piece after the others, with transformers' own cache."""
    cache = DynamicCache(config=model.config)
    return [step(model, p, cache) for p in pieces][-1]


def test_a_cache_that_has_been_decoding_can_be_cropped_from_then_on() -> None:
    model = qwen3_next(2, torch.float32)
    wide, plain = hf_models.float64(model), copy.deepcopy(model)
    hf.patch(model, experts=False)
    tokens = prompt(1, 1, 12)
    with torch.no_grad():
        started = model(tokens[:, :6], use_cache=True).past_key_values
    step(model, tokens[:, 6:7], started)
    cache = cache_of(model, 8, copy.deepcopy(started))
    step(model, torch.cat((tokens[:, 7:10], tokens[:, :3]), 1), cache)
    cache.crop(-3)
    pieces = list(tokens.split((6, 1, 3, 2), 1))
    peer, want = (piecewise(m, pieces) for m in (plain, wide))
    assert_within(step(model, pieces[-1], cache), peer, want, "logits")


def test_what_a_crop_cannot_do_is_refused() -> None:
    model = hf.patch(qwen3_next(2, torch.float32), experts=False)
    cache = cache_of(model, 4)
    step(model, prompt(0, 1, 9), cache)
    net = cache.layers[0]
    assert net.is_croppable and not net.is_compileable
    with pytest.raises(InvalidCall, match="at most the 4 tokens"):
        net.crop(-5)
    net.crop(-2)
    net.crop(0)
    with pytest.raises(InvalidCall, match="at most the 0 tokens"):
        net.crop(-1)
    with pytest.raises(InvalidCall, match="beam"):
        cache.reorder_cache(torch.tensor([0]))
    with pytest.raises(InvalidCall, match="offloading"):
        net.offload()
    hf.unpatch(model)
    with pytest.raises(InvalidCall, match="patched"):
        step(model, prompt(0, 1, 1), cache)


def test_a_reset_cache_starts_anew() -> None:
    model = hf.patch(qwen3_next(2, torch.float32), experts=False)
    cache = cache_of(model, 4)
    want = step(model, prompt(0, 1, 9), cache)
    cache.layers[0].reset()
    cache.layers[1] = type(cache.layers[1])()
    cache.layers[2].reset()
    assert_same(step(model, prompt(0, 1, 9), cache), want, "logits")


def test_a_failed_forward_leaves_nothing_to_the_next() -> None:
    model: Any = hf.patch(qwen3_next(2, torch.float32), experts=False)
    tokens = prompt(0, 1)
    want = greedy(model, tokens)
    cache = cache_of(model, 4)
    inbox, _ = hf_gdn.inbox(model.model.layers[0].linear_attn)
    inbox.put(cache.layers[0])
    cache.layers[0].recurrent_states[0] = torch.zeros(1)
    assert greedy(model, tokens) == want


# traffic ------------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """Bytes of states that verification moved; a write is seen by the bytes that changed."""

    tokens: list[int] = field(default_factory=list)
    size: int = 0
    read: int = 0
    written: int = 0
    record: int = 0

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> Traffic:
        own = hf_speculation.gdn_verify

        def counted(q: Any, k: Any, v: Any, **kwargs: Any) -> Any:
            state, draft = kwargs["state"], kwargs["draft"]
            before = state.clone()
            out = own(q, k, v, **kwargs)
            self.tokens.append(v.shape[1])
            self.size = state.nbytes
            self.read += state.nbytes
            self.written += 0 if torch.equal(before, state) else state.nbytes
            # written by this call, and read by the next one at most
            row = draft.u[:, 0].nbytes + sum(
                x[:, 0, 0].nbytes for x in (draft.k, draft.k_rnorm, draft.log_g)
            )
            self.record += 2 * v.shape[1] * row
            return out

        monkeypatch.setattr(hf_speculation, "gdn_verify", counted)
        return self

    @property
    def snapshots(self) -> int:
        """A state a token written, the accepted one copied: read 1, write T, read 1, write 1."""
        return sum((T + 3) * self.size for T in self.tokens)


@pytest.mark.parametrize("draft, accepted", [("itself", 4), ("wrong", 0)])
def test_a_step_reads_and_writes_one_state(
    draft: str, accepted: int, monkeypatch: pytest.MonkeyPatch, record_property: Any
) -> None:
    model, tokens = hf.patch(qwen3_next(2, torch.float32), experts=False), prompt(1, 1)
    helper = drafting(wrong(model) if draft == "wrong" else copy.deepcopy(model), 4)
    own_generate, seen = helper.generate, Traffic()

    # only the target is watched
    def unwatched(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.undo()
        try:
            return own_generate(*args, **kwargs)
        finally:
            seen.watch(monkeypatch)

    helper.generate = unwatched
    out = greedy(model, tokens, assistant_model=helper)[0]
    nets, S = 2, seen.size
    steps = len(seen.tokens) // nets
    assert steps == -(-len(out) // (accepted + 1))
    assert seen.read == steps * nets * S
    # the first step has nothing to fold
    assert seen.written == (steps - 1) * nets * S
    moved = seen.read + seen.written + seen.record
    assert moved < seen.snapshots
    record_property("bytes_per_token", moved / nets / len(out))
    record_property("bytes_per_token_of_snapshots", seen.snapshots / nets / len(out))
    if draft == "itself":
        # T = 5: 2 states against 8, and the records of these small heads
        assert (seen.read + seen.written) * 3 < seen.snapshots


def test_a_draft_step_writes_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf.patch(qwen3_next(2, torch.float32), experts=False)
    cache, seen = cache_of(model, 8), Traffic()
    step(model, prompt(0, 1, 3), cache)
    cache.crop(0)
    seen.watch(monkeypatch)
    step(model, prompt(1, 1, 1), cache)
    assert seen.written == seen.read
    for i in range(2, 8):
        step(model, prompt(i, 1, 1), cache)
    nets = 2
    assert seen.written == nets * seen.size
    assert seen.tokens == [T for T in range(1, 8) for _ in range(nets)]
