"""The registered operator: opcheck, torch.compile, explain, refusals."""

from dataclasses import replace

import pytest
import torch

import cutemoe
from cutemoe.gemm import api, plan
from cutemoe.gemm.problem import GemmProblem
from cutemoe.runtime.device import Device
from tests import strategies as draw
from tests.close import assert_same
from tests.gemm.cases import SUPPORTED, exact_x, offsets_of
from tests.moe.cases import exact_weight

W = exact_weight("mxfp4", (3, 48, 64), 1)
OFFSETS = offsets_of([4, 0, 5])
H200 = Device("cuda", 0, "H200", 90, 132, 232448, True)
GOOD = GemmProblem(64, 8, 256, 512, "mxfp4", 32, "rows", "bf16", "bf16", "none")
TRITON = next(b for b in plan.BACKENDS if b.name == "triton")


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_opcheck(monkeypatch, kind):
    seen = []
    op = api._grouped_gemm
    monkeypatch.setattr(api, "_grouped_gemm", lambda *args: seen.append(args) or op(*args))
    scale = torch.ones(9) if kind == "fp8" else None
    cutemoe.grouped_gemm(exact_x(9, 64, kind, 2), W, OFFSETS, x_scale=scale)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if kind != "fp8":
        # compares inputs before and after with a function that has no e4m3
        checks.append("test_schema")
    torch.library.opcheck(torch.ops.cutemoe.grouped_gemm.default, seen[0], test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
def test_compile(dynamic, prepared):
    torch._dynamo.reset()
    w = cutemoe.prepare_grouped_gemm(W) if prepared else W

    def model(x, offsets, out=None):
        return cutemoe.grouped_gemm(x + 0, w, offsets, out=out) + 1

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (9, 12):
        x = exact_x(rows, 64, "bf16", rows)
        assert_same(compiled(x, OFFSETS), model(x, OFFSETS))
        out = torch.empty(rows, 48, dtype=torch.bfloat16)
        compiled(x, OFFSETS, out)
        assert_same(out + 1, model(x, OFFSETS))


def test_explain():
    x = exact_x(9, 64, "bf16", 2)
    why = cutemoe.explain(cutemoe.grouped_gemm, x, W, OFFSETS)
    assert why.backend == "reference" and why.problem.rows == 9
    meta = cutemoe.explain("grouped_gemm", x.to("meta"), W.to("meta"), OFFSETS.to("meta"))
    assert meta.problem == why.problem


def test_the_prepared_back_end_is_the_default():
    w = exact_weight("fp8", (3, 48, 64), 1)
    p = cutemoe.prepare_grouped_gemm(w, backend="triton")
    x = exact_x(9, 64, "bf16", 2)
    with pytest.raises(cutemoe.Unsupported, match="triton"):
        cutemoe.grouped_gemm(x, p, OFFSETS)
    cutemoe.grouped_gemm(x, p, OFFSETS, backend="reference")


@pytest.mark.parametrize(("weight", "activations"), SUPPORTED)
def test_triton_takes_what_is_promised(weight, activations):
    problem = replace(GOOD, weight=weight, activations=activations)
    assert TRITON.reason(problem, H200) is None
    assert hash(TRITON.config(problem, H200)) is not None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"weight": "fp8"}, "weights in one of"),
        ({"weight": "bf16", "activations": "fp8"}, "bf16 weights take"),
        ({"layout": "tiles"}, "layout"),
        ({"groups": plan.MAX_GROUPS + 1}, "groups <= 1024, got 1025"),
        ({"rows": 2**31}, "rows <= "),
    ],
)
def test_triton_says_why_not(changed, words):
    assert words in (TRITON.reason(replace(GOOD, **changed), H200) or "")


@pytest.mark.parametrize("activations", ["bf16", "fp8"])
def test_sm80_is_enough(activations):
    a100 = Device("cuda", 0, "A100", 80, 108, 166912, True)
    assert TRITON.reason(replace(GOOD, activations=activations), a100) is None


def test_a_call_does_not_change_its_inputs():
    x, before = draw.normal((9, 64), 1, torch.bfloat16), W.data.clone()
    first = cutemoe.grouped_gemm(x, W, OFFSETS)
    assert_same(cutemoe.grouped_gemm(x, W, OFFSETS), first)
    assert_same(W.data, before)
