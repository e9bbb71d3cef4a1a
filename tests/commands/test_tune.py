"""`cutemoe tune`, with a back end that can be tuned on a CPU."""

import json

import pytest
import torch

from cutemoe import registry
from cutemoe.commands import tune as command
from cutemoe.runtime import tune
from cutemoe.runtime.device import Device
from cutemoe.runtime.preset import Layer

SMALL = Layer(128, 128, 4, 2, (("mxfp4", None, "bf16"),))
CARD = Device("cuda", 0, "a card", 90, 132, 232448, True)


def bench(times, format=("mxfp4", None, "bf16")) -> command.Bench:
    def us(calls) -> float:
        for call in calls:
            call()
        return next(times)

    return command.Bench(SMALL, format, torch.device("cpu"), us)


@pytest.fixture
def tunable(monkeypatch):
    """The configuration of the reference is None; two others can be tried."""
    how = tune.Tuning(
        key=lambda p: ({"hidden": p.hidden}, p.tokens),
        passes=lambda p, d: (lambda c: ["a", "b"],),
        plain=lambda c: {"name": c},
    )
    monkeypatch.setattr(registry, "tuning", lambda op, name: how)


@pytest.mark.parametrize("format", [("mxfp4", None, "bf16"), ("int4", 128, "fp8")])
def test_the_fastest_configuration_becomes_a_row(tunable, format):
    said = []
    row, before = command.tuned(bench(iter([9.0, 4.0, 5.0]), format), 5, 60.0, said.append)
    assert row == tune.Row("fused_moe", {"hidden": 128}, 5, {"name": "a"}, 4.0)
    assert before == 9.0 and len(said) == 3


def test_a_wrong_result_is_never_timed(tunable, monkeypatch):
    b = bench(iter([9.0, 1.0, 1.0]))
    right = b.calls

    def calls(tokens):
        made = right(tokens)

        def broken():
            y = made[0]()
            if tune.find("fused_moe", CARD, {}, 1) == {"name": "a"}:
                y += 1.0
            return y

        return [broken]

    monkeypatch.setattr(b, "calls", calls)
    said = []
    row, _ = command.tuned(b, 5, 60.0, said.append)
    assert row.config == {"name": "b"} and any("out, RuntimeError error" in s for s in said)


def test_report_and_text(tmp_path):
    shape = {"weight": "mxfp4", "activations": "bf16"}
    done = [("headline", tune.Row("fused_moe", shape, 16, {}, 80.0), 100.0)]
    assert "25.0 %" in command.text(done, tmp_path)
    assert json.dumps(command.report(done, tmp_path))


def test_without_a_card_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here, so the command would tune")
    assert command.run(preset=["headline"]) == 2
    assert "a CUDA device" in capsys.readouterr().err
