"""Every public argument of `grouped_gemm` and `prepare_grouped_gemm`, malformed."""

import pytest
import torch

import cutemoe
from tests import strategies as draw
from tests.gemm.cases import exact_x, offsets_of
from tests.moe.cases import exact_weight
from tests.poison import Poison, kept

G, N, K = 2, 48, 64
W = exact_weight("mxfp4", (G, N, K), 1)
DENSE = exact_weight("bf16", (G, N, K), 1)
X, OFFSETS = exact_x(9, K, "bf16", 2), offsets_of([4, 5])
X8 = exact_x(9, K, "fp8", 2)
WIDE = torch.zeros(9, 2 * K, dtype=torch.bfloat16)
P8 = cutemoe.prepare_grouped_gemm(W, activations="fp8")


def fp8(scale) -> dict:
    return {"x": X8, "x_scale": scale}


BAD = {
    "x type": ("x", {"x": [0]}),
    "x dtype": ("x", {"x": X.float()}),
    "x rank": ("x", {"x": X[0]}),
    "x rank without out": ("x", {"x": X[0], "out": None}),
    "x width": ("x", {"x": X[:, :32]}),
    "x stride": ("x", {"x": WIDE[:, ::2]}),
    "x grad": ("x", {"x": X.clone().requires_grad_()}),
    "x of dense weights": ("x", {"x": X.half(), "w": DENSE, "out": None}),
    "x of prepared weights": ("x", {"w": P8}),
    "w type": ("w", {"w": None}),
    "w rank": ("w", {"w": W[0]}),
    "w dtype": ("w", {"w": DENSE.float()}),
    "w empty": ("w", {"w": DENSE[:0]}),
    "w stride": ("w", {"w": DENSE.transpose(1, 2).contiguous().transpose(1, 2)}),
    "w grad": ("w", {"w": DENSE.clone().requires_grad_()}),
    "w device": ("w", {"w": W.to("meta")}),
    "group_offsets type": ("group_offsets", {"group_offsets": [0, 4, 9]}),
    "group_offsets dtype": ("group_offsets", {"group_offsets": OFFSETS.long()}),
    "group_offsets length": ("group_offsets", {"group_offsets": OFFSETS[:2]}),
    "group_offsets rank": ("group_offsets", {"group_offsets": OFFSETS[None]}),
    "group_offsets stride": ("group_offsets", {"group_offsets": torch.zeros(6).int()[::2]}),
    "group_offsets device": ("group_offsets", {"group_offsets": OFFSETS.to("meta")}),
    "x_scale of bf16": ("x_scale", {"x_scale": torch.ones(())}),
    "x_scale type": ("x_scale", fp8(1.0)),
    "x_scale dtype": ("x_scale", fp8(torch.ones(9).double())),
    "x_scale shape": ("x_scale", fp8(torch.ones(8))),
    "x_scale rank": ("x_scale", fp8(torch.ones(9, 1))),
    "x_scale stride": ("x_scale", fp8(torch.ones(18)[::2])),
    "x_scale device": ("x_scale", fp8(torch.ones(9, device="meta"))),
    "x_scale grad": ("x_scale", fp8(torch.ones(9, requires_grad=True))),
    "out type": ("out", {"out": 0}),
    "out dtype": ("out", {"out": torch.zeros(9, N)}),
    "out dtype of fp8": ("out", {"x": X8, "out": torch.zeros(9, N)}),
    "out shape": ("out", {"out": torch.zeros(9, N + 1, dtype=torch.bfloat16)}),
    "out stride": ("out", {"out": WIDE[:, : 2 * N : 2]}),
    "out overlapping": ("out", {"out": WIDE.as_strided((9, N), (8, 1))}),
    "out device": ("out", {"out": torch.zeros(9, N, dtype=torch.bfloat16, device="meta")}),
    "backend": ("backend", {"backend": "cuda"}),
    "backend type": ("backend", {"backend": 1}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named_and_nothing_is_written(case):
    name, changed = BAD[case]
    with Poison() as poison:
        out = poison.empty((9, N), torch.bfloat16)
        good = {"x": X, "w": W, "group_offsets": OFFSETS, "out": out}
        with kept(out=out):
            with pytest.raises(cutemoe.InvalidCall, match=rf"^{name}: "):
                cutemoe.grouped_gemm(**{**good, **changed})
            if name != "backend":
                with pytest.raises(cutemoe.InvalidCall, match=rf"^{name}: "):
                    cutemoe.explain("grouped_gemm", **{**good, **changed})


def broken(w: cutemoe.QuantizedTensor) -> cutemoe.QuantizedTensor:
    scale = w.scale.clone()
    scale[0, 0, 0] = 255
    return cutemoe.QuantizedTensor(w.data, scale, format=w.format)


PREPARE = {
    "w type": ("w", {"w": "mxfp4"}),
    "w rank": ("w", {"w": W[0]}),
    "w dtype": ("w", {"w": DENSE.float()}),
    "w nan scale": ("w", {"w": broken(W)}),
    "activations": ("activations", {"activations": "nvfp4"}),
    "activations dense": ("activations", {"w": DENSE, "activations": "fp16"}),
    "device": ("device", {"device": "gpu"}),
    "backend": ("backend", {"backend": "cuda"}),
}


@pytest.mark.parametrize("case", PREPARE)
def test_preparing_names_bad_arguments(case):
    name, changed = PREPARE[case]
    kwargs = {"w": W, **changed}
    with pytest.raises(cutemoe.InvalidCall, match=rf"^{name}: "):
        cutemoe.prepare_grouped_gemm(kwargs.pop("w"), **kwargs)


def test_prepared_weights_say_what_they_are():
    for word in ("2 groups", "48 x 64", "mxfp4 weights", "fp8 activations"):
        assert word in repr(P8)
    assert P8.shape == (G, N, K) and P8.nbytes == W.nbytes


def test_int4_groups():
    w = cutemoe.quantize(draw.normal((2, 8, 256), 1), "int4", group_size=128)
    got = cutemoe.grouped_gemm(exact_x(9, 256, "bf16", 2), w, OFFSETS)
    assert got.shape == (9, 8)
