"""The self-test finds what it looks for, and says so in one line."""

import json

import pytest
import torch

from cutemoe.__main__ import main
from cutemoe.commands import selftest
from cutemoe.commands.selftest import Findings
from tests.conftest import HAS_GPU


@pytest.mark.skipif(HAS_GPU, reason="a CUDA device is here")
def test_without_a_card_it_fails_in_one_line(capsys):
    assert main(["selftest"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("FAIL: cutemoe") and "needs a CUDA device" in out
    assert out.count("\n") == 1
    assert main(["selftest", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_a_layer_that_differs_fails():
    good = Findings("card", "versions", {"cute_nvfp4": (5, 5)}, 1e-3)
    assert good.ok and good.line() == (
        "OK: versions, card: cute_nvfp4 5/5, native to emulated 1.00e-03"
    )
    bad = Findings("card", "versions", {"cute_nvfp4": (4, 5), "cute_nvfp4_emulated": (5, 5)})
    assert not bad.ok and bad.line().startswith("FAIL: versions, card: cute_nvfp4 4/5, ")


def test_the_exact_layers_are_exact(monkeypatch):
    """In float32 and in float64, whatever the order of sums: the reference on the CPU."""
    from cutemoe.moe import api
    from cutemoe.moe.problem import Problem
    from cutemoe.moe.reference import fused_moe_reference

    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    from cutemoe.moe.prepare import prepare_moe as real

    monkeypatch.setattr(
        selftest.cutemoe,
        "prepare_moe",
        lambda *a, **k: real(*a, **{**k, "device": "cpu", "backend": "reference"}),
    )
    shapes = 0
    for x, moe, ids, weights, activation in selftest.layers(exact=True):
        t, _ = api._tensors(x, moe, ids, weights, activation, None, None, "reference")
        problem = Problem.of(
            t, activations="nvfp4", gate_up="gate_up", activation=api.kind(activation),
            expert_offset=0, deterministic=True, rounding="fused",
        )  # fmt: skip
        wide = fused_moe_reference(problem, t, torch.float64)
        narrow = fused_moe_reference(problem, t)
        assert torch.equal(narrow.double(), wide) and bool(wide.any())
        shapes += 1
    assert shapes == len(selftest.SHAPES)


@pytest.mark.gpu
def test_on_this_card(capsys):
    code = main(["selftest"])
    out = capsys.readouterr().out
    print(out)
    assert code == 0 and out.startswith("OK: ")
