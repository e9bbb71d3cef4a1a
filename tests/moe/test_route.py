"""Routing against straightforward formulas, its order of ties, and odd logits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cutemoe
from tests import strategies as draw
from tests.close import assert_same, assert_within
from tests.moe.cases import Target


@pytest.fixture(
    scope="module",
    params=[
        Target("reference", "cpu"),
        Target("triton", "cpu"),
        pytest.param(Target("reference", "cuda"), marks=pytest.mark.gpu),
        pytest.param(Target("triton", "cuda"), marks=pytest.mark.gpu),
    ],
    ids=str,
)
def target(request: pytest.FixtureRequest) -> Target:
    """The back ends of routing."""
    request.param.available()
    return request.param


METHODS = ("softmax_topk", "topk_softmax", "sigmoid", "grouped_sigmoid")
GROUPS = {"n_group": 4, "topk_group": 2}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def call(target: Target, logits: torch.Tensor, top_k: int, **kwargs) -> tuple:
    args = target.put(logits)
    if kwargs.get("bias") is not None:
        kwargs["bias"] = target.put(kwargs["bias"])
    ids, weights = cutemoe.route(args, top_k, backend=target.backend, **kwargs)
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    assert ids.shape == weights.shape == (logits.shape[0], top_k)
    return ids.cpu(), weights.cpu()


def drawn(shape: tuple[int, ...], seed: int, method: str, dtype: torch.dtype) -> torch.Tensor:
    """Logits. For the sigmoid methods from a coarse grid: no two different keys, nor sums of two,
    are so near that correct sigmoids may order them differently."""
    if method.endswith("sigmoid"):
        return (draw.integers(shape, seed, 16, torch.float32) / 4 + 1 / 16).to(dtype)
    return draw.normal(shape, seed, dtype)


def keyed(values: list[float]) -> list[int]:
    """Indices, greatest value first, NaN above all, ties by the lower index."""
    return sorted(range(len(values)), key=lambda i: (not math.isnan(values[i]), -values[i], i))


def chosen(row: torch.Tensor, bias: torch.Tensor | None, method: str, groups: dict) -> list[int]:
    """All experts of a token in the order of choice, in plain Python on float32 keys."""
    z = row.float()
    if method in ("softmax_topk", "topk_softmax") or (method == "sigmoid" and bias is None):
        return keyed(z.tolist())
    key = torch.sigmoid(z.double()).float() + (0 if bias is None else bias.float())
    if method == "sigmoid":
        return keyed(key.tolist())
    size = len(z) // groups["n_group"]
    tops = [float(part.sort(descending=True).values[:2].sum()) for part in key.split(size)]
    kept = keyed(tops)[: groups["topk_group"]]
    return [i for i in keyed(key.tolist()) if i // size in kept]


def weighed(
    logits: torch.Tensor,
    ids: torch.Tensor,
    method: str,
    renormalize: bool,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Weights [T, K] of the chosen experts by the formulas of the documentation."""
    z = logits.to(dtype)
    best = z.gather(1, ids.long())
    e = torch.exp(best - z.amax(1, keepdim=True))
    if method == "softmax_topk":
        w = e / torch.exp(z - z.amax(1, keepdim=True)).sum(1, keepdim=True)
    elif method == "topk_softmax":
        w = e / e.sum(1, keepdim=True)
    else:
        w = 1 / (1 + torch.exp(-best))
    total = w.sum(1, keepdim=True)
    return (w / total if renormalize and method != "topk_softmax" else w) * scale


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=draw.examples(0.6))
@given(
    seed=draw.seeds(),
    T=st.sampled_from([0, 1, 24]),
    eighth=st.integers(2, 24),
    renormalize=st.booleans(),
    biased=st.booleans(),
    scale=st.sampled_from([1.0, 2.5]),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_formulas(target, method, seed, T, eighth, renormalize, biased, scale, dtype, data):
    E = 8 * eighth
    K = data.draw(st.integers(1, min(E // 2, 32)))
    logits = drawn((T, E), seed, method, dtype)
    bias = None
    if biased and method.endswith("sigmoid"):
        bias = draw.integers((E,), seed + 1, 8, torch.float32) / 64
    groups = GROUPS if method == "grouped_sigmoid" else {}
    ids, weights = call(
        target,
        logits,
        K,
        method=method,
        renormalize=renormalize,
        scale=scale,
        bias=bias,
        **groups,
    )
    for row, i in zip(logits, ids, strict=True):
        assert i.tolist() == chosen(row, bias, method, groups)[:K]
    # the errors of a few rows say little of what torch's errors are
    if T == 24:
        exact = weighed(logits, ids, method, renormalize, scale, torch.float64)
        peer = weighed(logits, ids, method, renormalize, scale, torch.float32)
        assert_within(weights, peer, exact, "weights")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("E", "K"), [(1, 1), (2, 2), (8, 8), (100, 6), (384, 10), (1024, 32)])
def test_sizes(target, method, E, K):
    logits = drawn((3, E), E + K, method, torch.float32)
    groups = {}
    if method == "grouped_sigmoid":
        groups = {"n_group": 4, "topk_group": 4} if E % 4 == 0 else {"n_group": 1, "topk_group": 1}
    ids, _ = call(target, logits, K, method=method, **groups)
    for row, i in zip(logits, ids, strict=True):
        assert i.tolist() == chosen(row, None, method, groups)[:K]


@pytest.mark.parametrize("method", METHODS)
def test_ties_go_to_the_lower_index(target, method):
    groups = GROUPS if method == "grouped_sigmoid" else {}
    logits = draw.integers((40, 32), 1, 2, torch.float32)
    # -0 equals 0
    logits = torch.where(logits == 0, draw.integers((40, 32), 2, 1, torch.float32) * 0.0, logits)
    ids, _ = call(target, logits, 8, method=method, **groups)
    for row, i in zip(logits, ids, strict=True):
        assert i.tolist() == chosen(row, None, method, groups)[:8]
    ids, _ = call(target, torch.zeros(2, 32), 8, method=method, **groups)
    assert ids.tolist() == [list(range(8))] * 2


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=draw.examples(0.6))
@given(seed=draw.seeds())
def test_odd_logits_give_valid_distinct_ids(target, method, seed):
    groups = GROUPS if method == "grouped_sigmoid" else {}
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3e38, -3e38, 1.0])
    logits = odd[torch.randint(0, len(odd), (9, 16), generator=draw.generator(seed))]
    logits[0], logits[1], logits[2] = torch.nan, torch.inf, -torch.inf
    ids, weights = call(target, logits, 5, method=method, **groups)
    for row, i in zip(logits, ids, strict=True):
        assert sorted(set(i.tolist())) == sorted(i.tolist())
        assert int(i.min()) >= 0 and int(i.max()) < 16
        assert i.tolist() == chosen(row, None, method, groups)[:5]
    # NaN is chosen first, and what it touches is NaN
    first = logits.gather(1, ids.long())[:, 0].isnan()
    assert weights[first, 0].isnan().all()
    assert torch.equal(first, logits.isnan().any(1))


def test_minus_infinity_masks_an_expert(target):
    logits = draw.normal((6, 8), 5)
    logits[:, 3] = -torch.inf
    for method in ("softmax_topk", "topk_softmax", "sigmoid"):
        ids, weights = call(target, logits, 8, method=method)
        assert (ids[:, -1] == 3).all() and not weights[:, -1].any(), method
        assert torch.isfinite(weights).all()


def test_a_zero_sum_is_not_divided_by(target):
    logits = torch.full((1, 4), -torch.inf)
    _, weights = call(target, logits, 2, method="sigmoid")
    assert_same(weights, torch.zeros(1, 2))


def test_the_bias_moves_the_choice_only(target):
    logits = draw.normal((7, 16), 6)
    bias = torch.zeros(16)
    bias[[4, 9]] = 10.0
    ids, weights = call(target, logits, 2, method="sigmoid", bias=bias, renormalize=False)
    assert torch.equal(ids.sort(1).values, torch.tensor([[4, 9]] * 7, dtype=torch.int32))
    exact = torch.sigmoid(logits.double()).gather(1, ids.long())
    assert_within(weights, torch.sigmoid(logits).gather(1, ids.long()), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bias_may_have_any_floating_dtype(target, dtype):
    logits, bias = draw.normal((7, 16), 6), draw.normal((16,), 7, dtype)
    got = call(target, logits, 4, method="sigmoid", bias=bias)
    want = call(target, logits, 4, method="sigmoid", bias=bias.float())
    assert_same(got[0], want[0])
    assert_same(got[1], want[1])


def test_rows_may_have_any_stride(target):
    wide = draw.normal((9, 40), 8)
    logits = wide[::2, 4:20]
    for method in METHODS[:3]:
        got, want = (call(target, z, 3, method=method) for z in (logits, logits.contiguous()))
        assert_same(got[0], want[0])
        assert_same(got[1], want[1])


def test_transformers_agrees(target):
    """The router of Mixtral and Qwen, and the one of gpt-oss, written as transformers does."""
    logits = draw.normal((50, 64), 9)
    p = torch.softmax(logits, -1, dtype=torch.float)
    w, i = torch.topk(p, 8, dim=-1)
    ids, weights = call(target, logits, 8)
    assert_same(ids, i.int())
    exact = p.double().gather(1, i)
    assert_within(weights, w / w.sum(-1, keepdim=True), exact / exact.sum(-1, keepdim=True))
    top, i = torch.topk(logits, 4, dim=-1)
    ids, weights = call(target, logits, 4, method="topk_softmax")
    assert_same(ids, i.int())
    assert_within(weights, torch.softmax(top, 1), torch.softmax(top.double(), 1))


LOGITS = torch.zeros(3, 16)
BAD = {
    "logits list": ("logits", {"logits": [1.0]}),
    "logits dtype": ("logits", {"logits": LOGITS.double()}),
    "logits rank": ("logits", {"logits": LOGITS[0]}),
    "logits empty": ("logits", {"logits": torch.zeros(3, 0)}),
    "logits wide": ("logits", {"logits": torch.zeros(1, 1025)}),
    "logits stride": ("logits", {"logits": torch.zeros(16, 3).T}),
    "logits grad": ("logits", {"logits": torch.zeros(3, 16, requires_grad=True)}),
    "top_k 0": ("top_k", {"top_k": 0}),
    "top_k over E": ("top_k", {"top_k": 17}),
    "top_k over 32": ("top_k", {"logits": torch.zeros(1, 64), "top_k": 33}),
    "top_k bool": ("top_k", {"top_k": True}),
    "top_k float": ("top_k", {"top_k": 2.0}),
    "method": ("method", {"method": "softmax"}),
    "method type": ("method", {"method": 3}),
    "renormalize": ("renormalize", {"renormalize": 1}),
    "bias method": ("bias", {"bias": torch.zeros(16)}),
    "bias shape": ("bias", {"method": "sigmoid", "bias": torch.zeros(15)}),
    "bias dtype": ("bias", {"method": "sigmoid", "bias": torch.zeros(16, dtype=torch.int32)}),
    "bias stride": ("bias", {"method": "sigmoid", "bias": torch.zeros(32)[::2]}),
    "bias type": ("bias", {"method": "sigmoid", "bias": 1.0}),
    "bias grad": ("bias", {"method": "sigmoid", "bias": torch.zeros(16, requires_grad=True)}),
    "bias device": ("bias", {"method": "sigmoid", "bias": torch.zeros(16, device="meta")}),
    "n_group method": ("n_group", {"n_group": 4}),
    "topk_group method": ("topk_group", {"topk_group": 4}),
    "n_group": ("n_group", {"method": "grouped_sigmoid", "n_group": 5, "topk_group": 1}),
    "n_group none": ("n_group", {"method": "grouped_sigmoid", "topk_group": 1}),
    "n_group type": ("n_group", {"method": "grouped_sigmoid", "n_group": 4.0, "topk_group": 1}),
    "topk_group": ("topk_group", {"method": "grouped_sigmoid", "n_group": 4, "topk_group": 5}),
    "topk_group none": ("topk_group", {"method": "grouped_sigmoid", "n_group": 4}),
    "topk_group few": (
        "topk_group",
        {"method": "grouped_sigmoid", "n_group": 8, "topk_group": 1, "top_k": 3},
    ),
    "scale": ("scale", {"scale": "1"}),
    "backend": ("backend", {"backend": "cuda"}),
    "backend type": ("backend", {"backend": None}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    name, changed = BAD[case]
    kwargs = {"logits": LOGITS, "top_k": 2, **changed}
    with pytest.raises(cutemoe.InvalidCall, match=rf"^{name}: "):
        cutemoe.route(**kwargs)
    if name != "backend":
        with pytest.raises(cutemoe.InvalidCall, match=rf"^{name}: "):
            cutemoe.explain("route", **kwargs)
