"""Skewed routing: what the words mean, as counts."""

import moe_case
import torch

EXPERTS, TOKENS, TOP_K = 64, 20000, 4


def counts(skew: str) -> torch.Tensor:
    logits = torch.empty(TOKENS, EXPERTS)
    moe_case.draw_logits(logits, skew, torch.Generator().manual_seed(1))
    assert torch.isfinite(logits).all()
    return logits.topk(TOP_K).indices.flatten().bincount(minlength=EXPERTS)


def test_one_expert_is_every_tokens_choice_and_the_rest_are_even() -> None:
    n = counts("one")
    assert n[0] == TOKENS
    mean = TOKENS * (TOP_K - 1) / (EXPERTS - 1)
    assert ((n[1:] - mean).abs() < 6 * mean**0.5).all()


def test_first_choices_follow_zipf() -> None:
    logits = torch.empty(TOKENS, EXPERTS)
    moe_case.draw_logits(logits, "zipf", torch.Generator().manual_seed(2))
    n = logits.argmax(1).bincount(minlength=EXPERTS).double()
    p = 1.0 / torch.arange(1, EXPERTS + 1).double()
    mean = TOKENS * p / p.sum()
    assert ((n - mean).abs() < 6 * mean.sqrt()).all()


def test_without_skew_routing_is_even() -> None:
    n = counts("none").double()
    mean = TOKENS * TOP_K / EXPERTS
    assert ((n - mean).abs() < 6 * mean**0.5).all()
