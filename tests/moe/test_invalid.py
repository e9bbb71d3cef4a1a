"""Every public argument of `fused_moe`: malformed, it is named, and no byte is written."""

from typing import Any

import pytest
import torch

import cutemoe
from tests import strategies as draw
from tests.moe.cases import exact_layer, exact_x
from tests.poison import Poison, kept

T, K, E, H = 4, 2, 5, 64
LAYER = exact_layer("mxfp4", E=E, H=H)
MOE = LAYER.prepared()
FP8 = exact_layer("mxfp4", "fp8", E=E, H=H).prepared()
UNGATED = exact_layer("mxfp4", E=E, H=H, gated=False).prepared()
R = draw.Routing(T=T, K=K, E=E, offset=0, pattern="uniform", seed=1)
X, IDS, WEIGHTS = exact_x(T, LAYER, 1), R.ids(), R.weights()
WIDE = torch.zeros(T, 2 * H, dtype=torch.bfloat16)


SwiGLU: Any = cutemoe.SwiGLU
for_moe: Any = cutemoe.Workspace.for_moe


def swiglu(**params) -> dict:
    return {"activation": cutemoe.SwiGLU(**params)}


BAD = {
    "x type": ("x", {"x": X.tolist()}),
    "x dtype": ("x", {"x": X.float()}),
    "x not of the layer": ("x", {"x": X.half()}),
    "x rank": ("x", {"x": X[0]}),
    "x width": ("x", {"x": X[:, :32]}),
    "x stride": ("x", {"x": WIDE[:, ::2]}),
    "x grad": ("x", {"x": X.clone().requires_grad_()}),
    "moe type": ("moe", {"moe": (LAYER.w13, LAYER.w2)}),
    "moe device": ("moe", {"moe": MOE.to("meta")}),
    "ids type": ("ids", {"ids": IDS.tolist()}),
    "ids dtype": ("ids", {"ids": IDS.float()}),
    "ids int16": ("ids", {"ids": IDS.short()}),
    "ids rank": ("ids", {"ids": IDS.flatten()}),
    "ids tokens": ("ids", {"ids": IDS[:3]}),
    "ids no slots": ("ids", {"ids": IDS[:, :0], "weights": WEIGHTS[:, :0]}),
    "ids stride": ("ids", {"ids": IDS.T.contiguous().T}),
    "ids device": ("ids", {"ids": IDS.to("meta")}),
    "weights type": ("weights", {"weights": 1.0}),
    "weights dtype": ("weights", {"weights": WEIGHTS.bfloat16()}),
    "weights float64": ("weights", {"weights": WEIGHTS.double(), "rounding": "eager"}),
    "weights not of x": ("weights", {"weights": WEIGHTS.half(), "rounding": "eager"}),
    "weights shape": ("weights", {"weights": WEIGHTS[:, :1]}),
    "weights stride": ("weights", {"weights": WEIGHTS.T.contiguous().T}),
    "weights device": ("weights", {"weights": WEIGHTS.to("meta")}),
    "weights grad": ("weights", {"weights": WEIGHTS.clone().requires_grad_()}),
    "activation type": ("activation", {"activation": "silu"}),
    "activation class": ("activation", {"activation": cutemoe.SwiGLU}),
    "activation gated": ("activation", {"activation": cutemoe.ReLU2()}),
    "activation ungated": ("activation", {"moe": UNGATED}),
    "activation geglu ungated": ("activation", {"moe": UNGATED, "activation": cutemoe.GeGLU()}),
    "alpha shape": (r"activation\.alpha", swiglu(alpha=torch.ones(E + 1))),
    "beta dtype": (r"activation\.beta", swiglu(beta=torch.ones(E).double())),
    "limit device": (r"activation\.limit", swiglu(limit=torch.ones(E, device="meta"))),
    "limit stride": (r"activation\.limit", swiglu(limit=torch.ones(2 * E)[::2])),
    "alpha grad": (r"activation\.alpha", swiglu(alpha=torch.ones(E, requires_grad=True))),
    "expert_offset type": ("expert_offset", {"expert_offset": 1.0}),
    "expert_offset negative": ("expert_offset", {"expert_offset": -1}),
    "expert_offset large": ("expert_offset", {"expert_offset": 2**31 - E}),
    "expert_offset huge": ("expert_offset", {"expert_offset": 2**62}),
    "out type": ("out", {"out": [0]}),
    "out dtype": ("out", {"out": X.half()}),
    "out shape": ("out", {"out": torch.zeros(T + 1, H, dtype=torch.bfloat16)}),
    "out stride": ("out", {"out": WIDE[:, ::2]}),
    "out overlapping": ("out", {"out": WIDE.as_strided((T, H), (8, 1))}),
    "out device": ("out", {"out": X.to("meta")}),
    "workspace type": ("workspace", {"workspace": torch.zeros(10**6, dtype=torch.uint8)}),
    "workspace small": ("workspace", {"workspace": cutemoe.Workspace.for_moe(MOE, T, 1)}),
    "workspace device": (
        "workspace",
        {"workspace": cutemoe.Workspace(torch.zeros(10**6, dtype=torch.uint8, device="meta"))},
    ),
    "deterministic": ("deterministic", {"deterministic": 1}),
    "rounding": ("rounding", {"rounding": "torch"}),
    "rounding type": ("rounding", {"rounding": None}),
    "rounding of codes": ("rounding", {"rounding": "eager", "moe": FP8}),
    "backend": ("backend", {"backend": "cuda"}),
    "backend type": ("backend", {"backend": None}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_and_nothing_is_written(case):
    name, changed = BAD[case]
    with Poison() as poison:
        out = poison.empty((T, H), torch.bfloat16, strides=(H + 8, 1))
        space = cutemoe.Workspace(poison.empty((10**5,), torch.uint8))
        good = {"x": X, "moe": MOE, "ids": IDS, "weights": WEIGHTS, "out": out, "workspace": space}
        with kept(out=out, workspace=space.buffer):
            with pytest.raises(cutemoe.InvalidCall, match=rf"^{name}: "):
                cutemoe.fused_moe(**{**good, **changed})
            if name != "backend":
                with pytest.raises(cutemoe.InvalidCall, match=rf"^{name}: "):
                    cutemoe.explain("fused_moe", **{**good, **changed})


def test_the_good_call_is_good():
    with Poison() as poison:
        out = poison.empty((T, H), torch.bfloat16, strides=(H + 8, 1))
        space = cutemoe.Workspace(poison.empty((10**5,), torch.uint8))
        cutemoe.fused_moe(X, MOE, IDS, WEIGHTS, out=out, workspace=space)
        assert torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: SwiGLU(alpha=torch.nan), "alpha"),
        (lambda: SwiGLU(alpha=None), "alpha"),
        (lambda: SwiGLU(beta="1"), "beta"),
        (lambda: SwiGLU(beta=torch.inf), "beta"),
        (lambda: SwiGLU(limit=0.0), "limit"),
        (lambda: SwiGLU(limit=-1.0), "limit"),
        (lambda: SwiGLU(limit=True), "limit"),
        (lambda: cutemoe.GeGLU("sigmoid"), "approximate"),
        (lambda: for_moe(MOE, 0, 1), "max_tokens"),
        (lambda: for_moe(MOE, 1, 2.0), "top_k"),
        (lambda: for_moe(LAYER, 1, 1), "moe"),
        (lambda: cutemoe.Workspace(torch.zeros(8)), "buffer"),
        (lambda: cutemoe.Workspace(torch.zeros(800, dtype=torch.uint8)[::2]), "buffer"),
        (lambda: cutemoe.Workspace(torch.zeros(800, dtype=torch.uint8)[3:]), "buffer"),
    ],
)
def test_values_check_themselves(make, name):
    with pytest.raises(cutemoe.InvalidCall, match=rf"^{name}: "):
        make()


def test_a_gradient_is_refused_only_where_one_would_be_recorded():
    x = X.clone().requires_grad_()
    with torch.no_grad():
        y = cutemoe.fused_moe(x, MOE, IDS, WEIGHTS)
    assert not y.requires_grad
    with torch.inference_mode():
        cutemoe.fused_moe(x, MOE, IDS, WEIGHTS)
