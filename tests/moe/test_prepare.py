"""`prepare_moe`: what it keeps, what it expands, and every argument it refuses."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

import cutemoe
from cutemoe.gemm.weight import PACKED, PackedWeight
from cutemoe.layouts import sm90_rs_w4
from tests import strategies as draw
from tests.close import assert_same
from tests.moe.cases import COMBINATIONS, exact_layer, exact_weight, exact_x, random_layer

E, H, I = 3, 64, 96  # noqa: E741
INT4 = {"int4": 32}


def arguments(format: str = "mxfp4", activations: str = "bf16") -> dict:
    layer = random_layer(format, activations, E=E, H=H, I=I)
    return {
        "w13": layer.w13,
        "w2": layer.w2,
        "b13": layer.b13,
        "b2": layer.b2,
        "activations": activations,
        "input_scale": layer.input_scale,
    }


def prepare(**changed):
    kwargs = {**arguments(), **changed}
    return cutemoe.prepare_moe(kwargs.pop("w13"), kwargs.pop("w2"), **kwargs)


@pytest.mark.parametrize(("format", "activations"), COMBINATIONS)
def test_the_layer_says_what_it_is(format, activations):
    moe = prepare(**arguments(format, activations))
    assert (moe.experts, moe.hidden, moe.intermediate, moe.gated) == (E, H, I, True)
    assert moe.activations == activations and moe.w13.format == moe.w2.format == format
    for word in ("3 experts", f"{format} weights", f"{activations} activations", "b13 and b2"):
        assert word in repr(moe)
    parts = [p for w in (moe.w13, moe.w2) for p in (w.data, w.scale, w.factor)]
    parts += [moe.b13, moe.b2, moe.input_scale1, moe.input_scale2]
    assert moe.nbytes == sum(t.nbytes for t in parts if t is not None)


def test_an_ungated_layer():
    layer = exact_layer("int4", gated=False)
    moe = layer.prepared()
    assert not moe.gated and moe.w13.shape == (5, 96, 64) and "ungated" in repr(moe)


def test_nothing_is_copied_where_nothing_must_move():
    a = arguments()
    moe = prepare(**a)
    assert moe.w13.data.data_ptr() == a["w13"].data.data_ptr()
    assert moe.b2 is not None and moe.b2.data_ptr() == a["b2"].data_ptr()


def test_it_cannot_be_changed_and_holds_tensors_only():
    moe = prepare()
    with pytest.raises(FrozenInstanceError):
        moe.b2 = None  # type: ignore[misc]
    assert set(vars(moe)) == {f.name for f in moe.__dataclass_fields__.values()}


@pytest.mark.parametrize("format", ["bf16", "fp16", "mxfp4", "nvfp4", "int4", "fp8"])
def test_weights_unpack_to_what_was_packed(format):
    w = exact_weight(format, (E, 96, H), 1)
    back = PackedWeight.of(w).unpack()
    if isinstance(back, torch.Tensor):
        assert_same(back, w)
    else:
        assert_same(back.data.view(torch.uint8), w.data.view(torch.uint8))
        assert_same(back.dequantize(), w.dequantize())


@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int4"])
def test_packed_weights_unpack_to_what_was_packed(format, layout):
    w = cutemoe.quantize(draw.normal((E, 40, 160), 1), format, group_size=INT4.get(format))
    packed = PackedWeight.of(w, layout=layout)
    assert packed.layout == layout and packed.shape == (E, 40, 160)
    for back in (packed.unpack(), packed.in_rows().unpack()):
        assert isinstance(back, cutemoe.QuantizedTensor)
        assert_same(back.data, w.data)
        assert_same(back.scale.view(torch.uint8), w.scale.view(torch.uint8))
        assert_same(back.dequantize(), w.dequantize())
    one = packed.group(1)
    assert (one.layout, one.shape) == ("rows", (1, 40, 160))
    assert_same(one.data, w.data[1:2])


HOPPER = [
    (format, layout, group)
    for layout, compute in sm90_rs_w4.COMPUTE.items()
    for format in sm90_rs_w4.WEIGHTS[compute]
    for group in ((32, 64, 128) if format == "int4" else (None,))
]


@pytest.mark.parametrize("order", sm90_rs_w4.ORDERS)
@pytest.mark.parametrize(("format", "layout", "group"), HOPPER)
def test_hopper_weights_unpack_to_what_was_packed(format, layout, group, order):
    spread = torch.exp2(draw.integers((E, 80, 1), 2, 9, torch.float32))
    k = {64: 192, 128: 256}.get(group, 160)
    w = cutemoe.quantize(draw.normal((E, 80, k), 1) * spread, format, group_size=group)
    packed = PackedWeight.of(w, layout=layout, order=order)
    assert packed.layout == layout and packed.data.shape[1:3] == (2, -(-k // 64))
    for back in (packed.unpack(), packed.in_rows().unpack()):
        assert isinstance(back, cutemoe.QuantizedTensor)
        assert_same(back.data, w.data)
        assert_same(back.scale.view(torch.uint8), w.scale.view(torch.uint8))
        assert_same(back.dequantize(), w.dequantize())
    assert_same(packed.group(1).data, w.data[1:2])


@pytest.mark.parametrize(
    ("layout", "low", "kept"),
    [
        ("sm90_rs_w4_fp16", 127 - 24, True),
        ("sm90_rs_w4_fp16", 127 - 25, False),
        ("sm90_rs_w4_fp8", 127 - 11, True),
        ("sm90_rs_w4_fp8", 127 - 12, False),
    ],
)
def test_hopper_layouts_hold_mxfp4_exactly_or_not_at_all(layout, low, kept):
    data = draw.random_bytes((1, 16, 96), 1)
    scale = torch.full((1, 16, 6), 127, dtype=torch.uint8)
    scale[:, 3, 1] = low
    w = cutemoe.QuantizedTensor(data, scale, format="mxfp4")
    packed = PackedWeight.of(w, layout=layout)
    assert packed.layout == (layout if kept else "rows")
    back = packed.unpack()
    assert isinstance(back, cutemoe.QuantizedTensor)
    assert_same(back.dequantize(), w.dequantize())


def test_groups_of_zeros_do_not_widen_the_span_of_fp8():
    data = draw.random_bytes((1, 16, 96), 1)
    data[0, 3, 16:32] = 0x08
    scale = torch.full((1, 16, 6), 127, dtype=torch.uint8)
    scale[:, 3, 1] = 0
    scale[:, 4, 5] = 137
    w = cutemoe.QuantizedTensor(data, scale, format="mxfp4")
    packed = PackedWeight.of(w, layout="sm90_rs_w4_fp8")
    assert packed.layout == "sm90_rs_w4_fp8"
    back = packed.unpack()
    assert isinstance(back, cutemoe.QuantizedTensor)
    assert_same(back.dequantize(), w.dequantize())


def test_hopper_rows_bring_gate_and_up_together():
    at = sm90_rs_w4.row_order(64, "gate_up", torch.device("cpu"))
    assert at is not None
    assert at[:16].tolist() == [*range(8), *range(32, 40)] and sorted(at.tolist()) == [*range(64)]
    pairs = sm90_rs_w4.row_order(64, "interleaved", at.device)
    assert pairs is not None
    assert pairs[:16].tolist() == [*range(0, 16, 2), *range(1, 16, 2)]


@pytest.mark.parametrize("activations", ["bf16", "fp16", "fp8"])
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int4"])
def test_the_reference_reads_packed_layers(format, activations):
    layer = exact_layer(format, activations)
    rows = layer.prepared()
    packed = cutemoe.prepare_moe(
        layer.w13,
        layer.w2,
        layer.b13,
        layer.b2,
        activations=activations,
        input_scale=layer.input_scale,
        backend="triton",
    )
    if packed.w13.layout == "rows":
        pytest.skip("Triton runs nowhere here")
    r = draw.Routing(T=4, K=2, E=5, offset=0, pattern="uniform", seed=3)
    x, args = exact_x(4, layer, 5), (r.ids(), r.weights())
    want = cutemoe.fused_moe(x, rows, *args, backend="reference")
    assert_same(cutemoe.fused_moe(x, packed, *args, backend="reference"), want)


def test_both_weights_stay_in_rows_where_one_must():
    layer = exact_layer("mxfp4")
    scale = layer.w2.scale.clone()
    scale[0, 0, 0], scale[0, 0, 1] = 1, 250
    w2 = cutemoe.QuantizedTensor(layer.w2.data, scale, format="mxfp4")
    moe = cutemoe.prepare_moe(layer.w13, w2, backend="triton")
    assert moe.w13.layout == moe.w2.layout == "rows"
    assert_same(moe.w13.data, layer.w13.data)


def test_a_dense_transposed_view_is_made_contiguous():
    a = arguments("bf16")
    w13 = a["w13"].transpose(1, 2).contiguous().transpose(1, 2)
    moe = prepare(**{**a, "w13": w13})
    assert moe.w13.data.is_contiguous()
    assert_same(moe.w13.data, a["w13"])


@pytest.mark.parametrize("given", [0.5, torch.tensor(0.5), torch.tensor([0.5, 0.5, 0.5])], ids=str)
def test_global_scales_become_one_for_each_expert(given):
    w13 = cutemoe.quantize(draw.normal((E, 2 * I, H), 1), "nvfp4", global_scale=given)
    w2 = cutemoe.quantize(draw.normal((E, H, I), 2), "nvfp4")
    moe = prepare(w13=w13, w2=w2)
    assert moe.w13.factor is not None and moe.w2.factor is not None
    assert_same(moe.w13.factor, torch.full((E,), 0.5))
    assert moe.w2.factor.shape == (E,) and moe.w2.factor.is_contiguous()


@pytest.mark.parametrize(
    ("activations", "given", "want"),
    [
        ("fp8", None, None),
        ("fp8", 0.5, ([0.5] * 3, [0.5] * 3)),
        ("fp8", (0.5, torch.tensor([1.0, 2.0, 3.0])), ([0.5] * 3, [1.0, 2.0, 3.0])),
        ("nvfp4", None, ([1.0] * 3, [1.0] * 3)),
        ("nvfp4", (torch.tensor(0.25), 2), ([0.25] * 3, [2.0] * 3)),
        ("nvfp4", (torch.tensor([0.5]).double(), 1.0), ([0.5] * 3, [1.0] * 3)),
    ],
)
def test_input_scales_become_one_for_each_expert(activations, given, want):
    moe = prepare(**{**arguments("nvfp4"), "activations": activations, "input_scale": given})
    got = (moe.input_scale1, moe.input_scale2)
    if want is None:
        assert got == (None, None)
    else:
        for g, w in zip(got, want, strict=True):
            assert g is not None
            assert_same(g, torch.tensor(w))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_biases_become_float32(dtype):
    b = draw.normal((E, H), 1, dtype)
    got = prepare(b2=b).b2
    assert got is not None
    assert_same(got, b.float())


def test_a_trainable_parameter_is_taken_without_its_gradient():
    w2 = torch.nn.Parameter(arguments("bf16")["w2"])
    moe = prepare(**{**arguments("bf16"), "w2": w2})
    assert not moe.w2.data.requires_grad


def test_meta_layers_exist():
    """`explain` takes meta tensors, so a layer may live there."""
    moe = prepare().to("meta")
    assert moe.device.type == "meta" and moe.w13.data.device.type == "meta"
    moe = cutemoe.prepare_moe(moe.w13.unpack(), moe.w2.unpack())
    assert moe.device.type == "meta"
    assert prepare(device="meta").w2.device.type == "meta"


def broken(w: cutemoe.QuantizedTensor, byte: int) -> cutemoe.QuantizedTensor:
    scale = w.scale.clone()
    scale.view(torch.uint8)[1, 2, 0] = byte
    return replace_scale(w, scale)


def replace_scale(w: cutemoe.QuantizedTensor, scale: torch.Tensor) -> cutemoe.QuantizedTensor:
    return cutemoe.QuantizedTensor(w.data, scale, w.global_scale, format=w.format)


def bad_cases() -> dict:
    a, nv, dense = arguments(), arguments("nvfp4", "nvfp4"), arguments("bf16")
    i4 = arguments("int4")
    w13, w2 = a["w13"], a["w2"]
    negative = replace_scale(i4["w2"], -i4["w2"].scale)
    infinite = replace_scale(i4["w13"], i4["w13"].scale / 0)
    per_row = cutemoe.QuantizedTensor(
        nv["w2"].data, nv["w2"].scale, torch.ones(E, H), format="nvfp4"
    )
    odd: dict = {"w13": torch.zeros(E, 2 * 24, 40).bfloat16(), "b13": None, "b2": None}
    odd["w2"] = torch.zeros(E, 40, 24).bfloat16()
    return {
        "w13 type": ("w13", {"w13": [1]}),
        "w13 rank": ("w13", {"w13": w13[0]}),
        "w13 hidden": ("w13", {"w13": exact_weight("mxfp4", (E, 2 * I, 32), 1)}),
        "w13 experts": ("w13", {"w13": exact_weight("mxfp4", (E + 1, 2 * I, H), 1)}),
        "w13 rows": ("w13", {"w13": exact_weight("mxfp4", (E, 3 * I, H), 1)}),
        "w13 dtype": ("w13", {**dense, "w13": dense["w13"].float()}),
        "w13 nan scale": ("w13", {"w13": broken(w13, 255)}),
        "w13 infinite scale": ("w13", {**i4, "w13": infinite}),
        "w13 nvfp4 nan": ("w13", {**nv, "w13": broken(nv["w13"], 0x7F)}),
        "w13 nvfp4 negative": ("w13", {**nv, "w13": broken(nv["w13"], 0x80 | 0x30)}),
        "w2 type": ("w2", {"w2": None}),
        "w2 rank": ("w2", {"w2": w2[0]}),
        "w2 empty": ("w2", {**dense, "w2": torch.zeros(0, H, I, dtype=torch.bfloat16)}),
        "w2 nan scale": ("w2", {"w2": broken(w2, 255)}),
        "w2 negative scale": ("w2", {**i4, "w2": negative}),
        "w2 format": ("w2", {"w2": exact_weight("int4", (E, H, I), 1)}),
        "w2 dtype": ("w2", {"w2": torch.zeros(E, H, I)}),
        "w2 scale of rows": (r"w2\.global_scale", {**nv, "w2": per_row}),
        "b13 shape": ("b13", {"b13": torch.zeros(E, I)}),
        "b13 dtype": ("b13", {"b13": torch.zeros(E, 2 * I, dtype=torch.int32)}),
        "b13 type": ("b13", {"b13": 1.0}),
        "b2 shape": ("b2", {"b2": torch.zeros(H)}),
        "b2 dtype": ("b2", {"b2": torch.zeros(E, H).bool()}),
        "activations": ("activations", {"activations": "int8"}),
        "activations dense": ("activations", {**dense, "activations": "fp16"}),
        "activations width": ("activations", {**odd, "activations": "nvfp4"}),
        "activations width of mxfp4": ("activations", {**odd, "activations": "mxfp4"}),
        "input_scale mxfp4": ("input_scale", {"activations": "mxfp4", "input_scale": (1.0, 1.0)}),
        "gate_up": ("gate_up", {"gate_up": "interleave"}),
        "gate_up none": ("gate_up", {"gate_up": None}),
        "input_scale bf16": ("input_scale", {"input_scale": 1.0}),
        "input_scale one": ("input_scale", {**nv, "input_scale": 1.0}),
        "input_scale three": ("input_scale", {**nv, "input_scale": (1.0, 1.0, 1.0)}),
        "input_scale shape": ("input_scale", {**nv, "input_scale": (torch.ones(2), 1.0)}),
        "input_scale rank": ("input_scale", {**nv, "input_scale": (torch.ones(E, 1), 1.0)}),
        "input_scale zero": ("input_scale", {**nv, "input_scale": (1.0, 0.0)}),
        "input_scale tiny": ("input_scale", {**nv, "input_scale": (1.0, 1e-37)}),
        "input_scale nan": ("input_scale", {**nv, "input_scale": (torch.nan, 1.0)}),
        "input_scale negative": ("input_scale", {"activations": "fp8", "input_scale": -1.0}),
        "input_scale type": ("input_scale", {**nv, "input_scale": ("1", 1.0)}),
        "input_scale bool": ("input_scale", {"activations": "fp8", "input_scale": True}),
        "device": ("device", {"device": "gpu"}),
        "device type": ("device", {"device": [0]}),
        "backend": ("backend", {"backend": "cuda"}),
        "backend type": ("backend", {"backend": None}),
    }


BAD = bad_cases()


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    name, changed = BAD[case]
    with pytest.raises(cutemoe.InvalidCall, match=rf"^{name}: "):
        prepare(**changed)


def test_layers_replace_cleanly():
    """Dataclass tools work, as integrations use them."""
    moe = prepare()
    assert replace(moe, backend="reference").backend == "reference"
