"""Environment variables: what each does, and that none is needed."""

import pytest
import torch

import cutemoe
from cutemoe import InvalidCall
from cutemoe.runtime import settings


@pytest.mark.parametrize(
    ("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True), ("true", True)]
)
def test_triton_interpret(monkeypatch, value, expected):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert settings.triton_interprets() is expected


def test_default_backend(monkeypatch):
    monkeypatch.delenv("CUTEMOE_BACKEND", raising=False)
    assert settings.default_backend() == "auto"
    monkeypatch.setenv("CUTEMOE_BACKEND", "reference")
    assert settings.default_backend() == "reference"


def test_the_environment_chooses_where_the_call_does_not(monkeypatch):
    logits = torch.zeros(2, 4)
    monkeypatch.setenv("CUTEMOE_BACKEND", "reference")
    assert cutemoe.explain("route", logits, 2).backend == "reference"
    monkeypatch.setenv("CUTEMOE_BACKEND", "nonsense")
    with pytest.raises(InvalidCall, match=r"^backend: expected 'auto' or one of .*got 'nonsense'"):
        cutemoe.route(logits, 2)
