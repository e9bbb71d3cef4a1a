"""The registered operators: opcheck, torch.compile, explain, the choice of a back end."""

import pytest
import torch

import cutemoe
from cutemoe.moe import operator
from tests import strategies as draw
from tests.close import assert_same
from tests.moe.cases import SATURATED, Layer, exact_layer, exact_x

T, K, E = 6, 2, 5


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


# layers here are prepared for the reference, which is what an "auto" call runs on the CPU
def inputs(layer: Layer, tokens: int = T) -> tuple[torch.Tensor, torch.Tensor]:
    return exact_x(tokens, layer, 3), draw.normal((tokens, E), 4)


def arguments_of(monkeypatch, name: str, call) -> tuple:
    """What a public call hands to its operator."""
    op, seen = getattr(operator, name), []
    monkeypatch.setattr(operator, name, lambda *args: seen.append(args) or op(*args))
    call()
    return seen[0]


@pytest.mark.parametrize("method", ["softmax_topk", "grouped_sigmoid"])
def test_opcheck_route(monkeypatch, method):
    kwargs = {}
    if method == "grouped_sigmoid":
        kwargs = {"n_group": 4, "topk_group": 2, "bias": torch.zeros(8)}
    args = arguments_of(
        monkeypatch,
        "route",
        lambda: cutemoe.route(draw.normal((3, 8), 1), 2, method=method, **kwargs),
    )
    torch.library.opcheck(torch.ops.cutemoe.route.default, args)


@pytest.mark.parametrize(
    ("format", "activations"),
    [("mxfp4", "bf16"), ("nvfp4", "nvfp4"), ("mxfp4", "mxfp4"), ("fp16", "fp16")],
)
@pytest.mark.parametrize("full", [True, False], ids=["all", "few"])
def test_opcheck_fused_moe(monkeypatch, format, activations, full):
    layer = exact_layer(format, activations, biases=full)
    moe = layer.prepared()
    x, logits = inputs(layer)
    ids, weights = cutemoe.route(logits, K)
    options = {}
    if full:
        options["workspace"] = cutemoe.Workspace.for_moe(moe, T, K)
        options["activation"] = cutemoe.SwiGLU(torch.ones(E), 1.0, torch.full((E,), 3.0))
    args = arguments_of(
        monkeypatch,
        "fused_moe",
        lambda: cutemoe.fused_moe(x, moe, ids, weights, **options),
    )
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if format != "nvfp4":
        # compares inputs before and after with a function that has no e4m3
        checks.append("test_schema")
    torch.library.opcheck(torch.ops.cutemoe.fused_moe.default, args, test_utils=checks)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("with_buffers", [False, True])
def test_compile(dynamic, with_buffers):
    layer = exact_layer("mxfp4")
    moe = layer.prepared()
    space = cutemoe.Workspace.for_moe(moe, 2 * T, K) if with_buffers else None

    def model(x, logits, out=None):
        ids, weights = cutemoe.route(logits, K, method="topk_softmax", scale=2.0)
        y = cutemoe.fused_moe(
            x + 0, moe, ids, weights, activation=SATURATED, workspace=space, out=out
        )
        return y * 2

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (T, 2 * T - 1, 1):
        x, logits = inputs(layer, tokens)
        out = torch.full_like(x, torch.nan) if with_buffers else None
        assert_same(compiled(x, logits, out), model(x, logits))
        if out is not None:
            assert_same(2 * out, model(x, logits))


def test_compile_takes_layers_and_activations_as_arguments():
    def model(x, moe, ids, weights, limit):
        act = cutemoe.SwiGLU(alpha=4096.0, limit=limit)
        return cutemoe.fused_moe(x, moe, ids, weights, activation=act, expert_offset=1)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for format in ("int4", "bf16"):
        layer = exact_layer(format)
        x, logits = inputs(layer)
        ids, weights = cutemoe.route(logits, K)
        args = (x, layer.prepared(), ids, weights, torch.arange(1, 6).float())
        assert_same(compiled(*args), model(*args))


def test_a_malformed_call_fails_while_compiling():
    layer = exact_layer("mxfp4")
    moe = layer.prepared()
    x, logits = inputs(layer)
    ids, weights = cutemoe.route(logits, K)
    compiled = torch.compile(cutemoe.fused_moe, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="weights: expected"):
        compiled(x, moe, ids, weights[:, :1])


def test_no_operator_is_differentiable_and_outputs_say_so():
    layer = exact_layer("mxfp4")
    x, logits = inputs(layer)
    ids, weights = cutemoe.route(logits, K)
    assert not cutemoe.fused_moe(x, layer.prepared(), ids, weights).requires_grad


def test_explain_names_the_choice_and_every_reason():
    layer = exact_layer("fp8")
    moe = layer.prepared()
    x, logits = inputs(layer)
    ids, weights = cutemoe.route(logits, K)
    why = cutemoe.explain(cutemoe.fused_moe, x, moe, ids, weights)
    assert why.backend == "reference" and why.problem.weight == "fp8"
    reasons = {r.name: r.reason for r in why.reasons}
    assert reasons["reference"] is None and reasons["triton"]
    assert "triton: " in str(why)
    refused = cutemoe.explain("fused_moe", x, moe, ids, weights, backend="triton")
    assert refused.backend is None


def test_explain_takes_meta_tensors():
    layer = exact_layer("mxfp4")
    moe = layer.prepared().to("meta")
    x, logits = (t.to("meta") for t in inputs(layer))
    ids, weights = cutemoe.route(logits, K)
    assert ids.device.type == "meta" and ids.shape == (T, K)
    assert cutemoe.explain("route", logits, K).backend == "reference"
    assert cutemoe.explain("fused_moe", x, moe, ids, weights).problem.tokens == T
    assert cutemoe.fused_moe(x, moe, ids, weights).shape == x.shape


def test_the_layer_keeps_a_back_end(monkeypatch):
    layer = exact_layer("fp8")
    x, logits = inputs(layer)
    ids, weights = cutemoe.route(logits, K)
    moe = cutemoe.prepare_moe(layer.w13, layer.w2, backend="triton")
    with pytest.raises(cutemoe.Unsupported, match="triton"):
        cutemoe.fused_moe(x, moe, ids, weights)
    cutemoe.fused_moe(x, moe, ids, weights, backend="reference")
    plain = cutemoe.prepare_moe(layer.w13, layer.w2)
    monkeypatch.setenv("CUTEMOE_BACKEND", "triton")
    with pytest.raises(cutemoe.Unsupported, match="triton"):
        cutemoe.fused_moe(x, plain, ids, weights)


def test_back_ends_are_listed():
    for op in ("route", "fused_moe", "grouped_gemm"):
        names = [r.name for r in cutemoe.backends(op)]
        assert names[-2:] == ["triton", "reference"]
        assert cutemoe.backends(op)[-1].reason is None


def test_calls_do_not_change_the_layer():
    layer = exact_layer("nvfp4", "nvfp4")
    moe = layer.prepared()
    before = dict(vars(moe))
    x, logits = inputs(layer)
    ids, weights = cutemoe.route(logits, K)
    first = cutemoe.fused_moe(x, moe, ids, weights)
    assert_same(cutemoe.fused_moe(x, moe, ids, weights, deterministic=False), first)
    assert vars(moe) == before
