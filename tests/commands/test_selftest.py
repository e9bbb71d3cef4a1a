"""The self-test finds what it looks for, and says so in one line."""

import json
import types

import pytest
import torch

import cutemoe
from cutemoe.__main__ import main
from cutemoe.commands import selftest, workers
from cutemoe.commands.selftest import Findings
from cutemoe.gemm import reference as gemm
from cutemoe.moe import api, reference
from cutemoe.moe.prepare import prepare_moe
from cutemoe.moe.problem import Problem
from cutemoe.runtime.compile import build_count, no_jit
from cutemoe.runtime.device import compile_only
from tests.conftest import HAS_GPU
from tests.moe.cases import lowest_bit


@pytest.mark.skipif(HAS_GPU, reason="a CUDA device is here")
def test_without_a_card_it_fails_in_one_line(capsys):
    assert main(["selftest"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("FAIL: cutemoe") and "needs a CUDA device" in out
    assert out.count("\n") == 1
    assert main(["selftest", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_a_layer_that_differs_fails():
    right = {"nvfp4 cute_nvfp4": (5, 5), "mxfp4 cute_nvfp4": (5, 5)}
    good = Findings("card", "versions", right, {"nvfp4": 1e-3, "mxfp4": 0.0})
    assert good.ok and good.line() == (
        "OK: versions, card: nvfp4 cute_nvfp4 5/5, mxfp4 cute_nvfp4 5/5, "
        "nvfp4 native to emulated 1.00e-03, mxfp4 native to emulated 0.00e+00"
    )
    bad = Findings("card", "versions", {**right, "mxfp4 cute_nvfp4": (4, 5)})
    assert not bad.ok and bad.line().endswith("nvfp4 cute_nvfp4 5/5, mxfp4 cute_nvfp4 4/5")


@pytest.fixture
def on_cpu(monkeypatch):
    """Layers of the self-test on the CPU, for the reference."""
    monkeypatch.setattr(selftest, "_place", lambda: "cpu")
    monkeypatch.setattr(
        selftest.cutemoe,
        "prepare_moe",
        lambda *a, **k: prepare_moe(*a, **{**k, "device": "cpu", "backend": "reference"}),
    )


def tensors(x, moe, ids, weights, activation):
    t, _ = api._tensors(x, moe, ids, weights, activation, None, None, "reference")
    problem = Problem.of(
        t, activations=moe.activations, gate_up="gate_up", activation=api.kind(activation),
        expert_offset=0, deterministic=True,
    )  # fmt: skip
    return problem, t


@pytest.mark.parametrize("kind", selftest.KINDS)
def test_the_exact_layers_are_exact(kind, on_cpu, monkeypatch):
    """In float32 and in float64, whatever the order of sums: the reference on the CPU."""
    shapes, sums = 0, []

    def multiply(x, w, group):
        dense = w.group(group).values(slice(0, w.shape[1]), torch.float64)
        most = (x.double().abs() @ dense.abs().T).amax(1)
        low = torch.tensor([lowest_bit(row) for row in x], dtype=torch.float64)
        sums.append(float((most / low).max()) / lowest_bit(dense))
        return gemm.multiply(x, w, group)

    for call in selftest.layers(kind, exact=True):
        assert (call[1].w13.format, call[1].activations) == selftest.KINDS[kind]
        problem, t = tensors(*call)
        wide = reference.fused_moe_reference(problem, t, torch.float64)
        with monkeypatch.context() as m:
            m.setattr(reference, "multiply", multiply)
            narrow = reference.fused_moe_reference(problem, t)
        assert torch.equal(narrow.double(), wide) and bool(wide.any())
        shapes += 1
    assert shapes == len(selftest.SHAPES)
    # units of the lowest bit in the greatest sum of magnitudes of a row
    assert max(sums) < 2**24


def test_every_back_end_is_compared_in_every_kind(on_cpu, monkeypatch):
    monkeypatch.setattr(selftest, "SHAPES", selftest.SHAPES[:1])
    card = types.SimpleNamespace(of=lambda _: types.SimpleNamespace(arch=120))
    monkeypatch.setattr(selftest, "Device", card)

    def call(x, moe, ids, weights, activation, backend):
        y = cutemoe.fused_moe(x, moe, ids, weights, activation=activation)
        wrong = (backend, moe.activations) == ("cute_nvfp4_static", "mxfp4")
        return y + wrong if backend != selftest.EMULATED else y * 2

    monkeypatch.setattr(selftest, "_call", call)
    found = Findings("card", "versions")
    selftest.compare(found)
    numbers = [f"w4a16 {b}" for b in selftest.STYLES if b != selftest.EMULATED]
    codes = [f"{f} {b}" for f in selftest.BLOCK for b in selftest.STYLES]
    assert list(found.exact) == codes + numbers
    failed = {name for name, (n, of) in found.exact.items() if n < of}
    emulated = {f"{f} {selftest.EMULATED}" for f in selftest.BLOCK}
    assert failed == {"mxfp4 cute_nvfp4_static", *emulated}
    assert all(of == 1 for _, of in found.exact.values())
    assert found.random == {"nvfp4": 0.5, "mxfp4": 0.5}


@pytest.mark.parametrize("kind", selftest.KINDS)
def test_every_layer_is_compiled_ahead(kind, tmp_path, monkeypatch):
    """What a worker compiles for a layer is all that a call of it needs."""
    pytest.importorskip("cutlass")
    monkeypatch.setenv("CUTEMOE_CACHE_DIR", str(tmp_path / "kept"))
    job = selftest.Job(kind, 0, "cute_nvfp4_static")
    (done,) = workers.compiled([job], "sm_120a", 1, lambda *_: None)
    assert not done.error and done.kernels
    before = build_count()
    with compile_only("sm_120a"), no_jit():
        job.run()
    assert build_count() == before
    assert str(job) == f"{kind} layer 1 of 5, cute_nvfp4_static"


def test_a_cards_jobs_are_those_of_its_back_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("CUTEMOE_CACHE_DIR", str(tmp_path / "kept"))
    asked = []
    monkeypatch.setattr(selftest, "compiled", lambda jobs, *rest: asked.append((jobs, *rest)))
    for arch in ("sm_90a", "sm_120a"):
        with compile_only(arch) as device:
            selftest.prepare(device, workers.Progress(False))
    (here, name, *_), (there, other, *_) = asked
    assert (name, other) == ("sm_90a", "sm_120a")
    # on a card without the instructions nothing is emulated by name
    assert (len(here), len(there)) == (3 * 4 * 5, (2 * 5 + 4) * 5)


@pytest.mark.gpu
def test_on_this_card(capsys):
    code = main(["selftest"])
    out = capsys.readouterr().out
    print(out)
    assert code == 0 and out.startswith("OK: ")
