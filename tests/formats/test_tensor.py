"""QuantizedTensor: values, indexing, and an error for every argument."""

import copy
import io

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cutemoe
from cutemoe import InvalidCall, QuantizedTensor
from cutemoe.formats import FORMATS, broken_scales, find_format
from tests import strategies as draw
from tests.close import assert_same
from tests.formats import oracle

CASES = [(f, g) for f, groups in oracle.GROUPS.items() for g in groups]
cases = pytest.mark.parametrize(("name", "group"), CASES, ids=lambda v: str(v))


def random_tensor(name, group, lead, blocks, seed, global_shape=None):
    """Random bytes everywhere: NaN, infinities, subnormals and -0 among codes and scales."""
    f = FORMATS[name]
    k = blocks * (group or 16)
    data = draw.random_bytes((*lead, k // f.codes_per_byte), seed).view(f.data_dtype)
    shape = (*lead, blocks * f.scale_dtype.itemsize) if group else (*lead, 4)
    scale = draw.random_bytes(shape, seed + 1).view(f.scale_dtype)
    scale = scale if group else scale.view(lead)
    g = None if global_shape is None else draw.normal(global_shape, seed + 2)
    return QuantizedTensor(data, scale, g, format=name, group_size=group or None)


def exact(q) -> np.ndarray:
    """float64, by table look-up in numpy."""
    codes = oracle.code_values(q.format)[oracle.codes_of(q)]
    scale = oracle.scale_values(q.format, oracle.scale_bytes(q))
    with np.errstate(all="ignore"):
        if q.group_size:
            value = codes * np.repeat(scale, q.group_size, axis=-1)
        else:
            value = codes * scale.reshape(scale.shape + (1,) * (codes.ndim - scale.ndim))
        if q.global_scale is not None:
            g = q.global_scale.numpy().astype(np.float64)
            value = value * g.reshape(g.shape + (1,) * (codes.ndim - g.ndim))
    return value


@cases
@given(seed=draw.seeds(), lead=draw.leading(), blocks=st.integers(1, 3))
def test_dequantize_is_exact(name, group, seed, lead, blocks):
    for global_shape in (None, (), lead[:1], lead) if name == "nvfp4" else (None,):
        q = random_tensor(name, group, lead, blocks, seed, global_shape)
        want = torch.from_numpy(exact(q)).view(q.shape)
        assert_same(q.dequantize(torch.float64), want)
        # one rounding: a product of codes and block scales is exact in float32
        assert_same(q.dequantize(), want.float())
        for dtype in (torch.bfloat16, torch.float16):
            assert_same(q.dequantize(dtype), want.float().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dequantize_gives_the_dtype(dtype):
    assert cutemoe.quantize(torch.ones(4, 128), "int4").dequantize(dtype).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, None, "float32"])
def test_dequantize_refuses_other_dtypes(dtype):
    with pytest.raises(InvalidCall, match=r"^dtype: expected float16"):
        cutemoe.quantize(torch.ones(4, 128), "int4").dequantize(dtype)


@cases
@pytest.mark.parametrize("index", [0, -1, slice(1, 3), slice(0, 0), [2, 0], "mask", "tensor"])
def test_indexing_is_that_of_the_values(name, group, index):
    if index == "mask":
        index = torch.tensor([True, False, True])
    elif index == "tensor":
        index = torch.tensor([1, 1, 0, 2])
    for global_shape in (None, (), (3,), (3, 2)) if name == "nvfp4" else (None,):
        q = random_tensor(name, group, (3, 2), 2, 11, global_shape)
        part = q[index]
        assert isinstance(part, QuantizedTensor) and part.group_size == q.group_size
        assert_same(part.dequantize(), q.dequantize()[index])


@pytest.mark.parametrize("index", [(0, 1), None, Ellipsis, 1.0])
def test_indexing_refuses_what_reaches_the_last_dimension(index):
    q = cutemoe.quantize(torch.ones(3, 2, 32), "mxfp4")
    with pytest.raises(InvalidCall, match=r"^index: expected an int, a slice"):
        q[index]
    with pytest.raises(InvalidCall, match=r"^index: .* got rank 1"):
        q[0][0][0]
    with pytest.raises(IndexError):
        q[3]


def test_fp8_scales_of_a_tensor_an_expert_or_a_row():
    data = draw.integers((2, 3, 8), 1, 8, torch.float32).to(torch.float8_e4m3fn)
    for shape in ((), (2,), (2, 3)):
        scale = draw.powers_of_two(shape, 2)
        q = QuantizedTensor(data, scale, format="fp8")
        wide = scale.reshape(shape + (1,) * (3 - len(shape)))
        assert_same(q.dequantize(), data.float() * wide)
        assert_same(q[1].dequantize(), (data.float() * wide)[1])


def test_attributes_and_repr():
    q = cutemoe.quantize(torch.ones(2, 3, 64), "nvfp4")
    assert q.shape == (2, 3, 64) and q.ndim == 3 and q.device == torch.device("cpu")
    assert q.nbytes == 2 * 3 * (32 + 4) + 4
    assert repr(q) == "QuantizedTensor(nvfp4, [2, 3, 64], group_size=16, device=cpu)"
    assert repr(cutemoe.quantize(torch.ones(2), "fp8")) == "QuantizedTensor(fp8, [2], device=cpu)"
    with pytest.raises(AttributeError):
        q.data = q.data  # type: ignore[misc]
    assert q == q and q != cutemoe.quantize(torch.ones(2, 3, 64), "nvfp4")


def test_to_copy_and_save():
    q = cutemoe.quantize(torch.ones(2, 64), "nvfp4")
    meta = q.to("meta")
    assert meta.device.type == "meta" and meta.dequantize(torch.bfloat16).shape == (2, 64)
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    for other in (q.to("cpu"), copy.deepcopy(q), torch.load(file, weights_only=False)):
        assert_same(other.dequantize(), q.dequantize())
        assert (other.format, other.group_size) == (q.format, q.group_size)
    plain = cutemoe.quantize(torch.ones(2, 64), "mxfp4")
    assert plain.to("meta").global_scale is None


@cases
def test_meta_tensors_quantize(name, group):
    q = cutemoe.quantize(torch.ones(3, 256, device="meta"), name, group_size=group or None)
    assert q.shape == (3, 256) and q.device.type == "meta"


@cases
def test_compiles_in_one_graph(name, group):
    def there_and_back(x):
        return cutemoe.quantize(x, name, group_size=group or None).dequantize(torch.bfloat16)

    x = draw.normal((6, 256), 4)
    got = torch.compile(there_and_back, fullgraph=True, backend="eager")(x)
    assert_same(got, there_and_back(x))


def test_strided_parts():
    data = draw.random_bytes((16, 6), 1)
    scale = draw.random_bytes((1, 6), 2) // 2
    q = QuantizedTensor(data.T, scale.T, format="mxfp4")
    dense = QuantizedTensor(data.T.contiguous(), scale.T.contiguous(), format="mxfp4")
    assert_same(q.dequantize(), dense.dequantize())


def test_group_size_comes_from_the_shapes():
    data = torch.zeros(2, 64, dtype=torch.uint8)
    for group in (128, 64, 32):
        scale = torch.ones(2, 128 // group, dtype=torch.bfloat16)
        assert QuantizedTensor(data, scale, format="int4").group_size == group


def test_nvfp4_scales_may_come_as_bytes():
    data, scale = draw.random_bytes((2, 8), 1), draw.random_bytes((2, 1), 2)
    a = QuantizedTensor(data, scale, format="nvfp4")
    b = QuantizedTensor(data, scale.view(torch.float8_e4m3fn), format="nvfp4")
    assert a.scale.dtype == torch.float8_e4m3fn
    assert_same(a.dequantize(), b.dequantize())


def test_a_global_scale_of_one_element_is_a_scalar():
    x = torch.ones(1, 2, 16)
    for d in (0.5, torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]])):
        q = cutemoe.quantize(x, "nvfp4", global_scale=d)
        assert q.global_scale is not None and q.global_scale.shape == ()


U8, BF16, F8 = torch.uint8, torch.bfloat16, torch.float8_e4m3fn


def zeros(*shape, dtype=U8, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(data=[1], scale=zeros(1), format="mxfp4"), "data: expected a torch.Tensor, got list"),
        (dict(data=zeros(16), scale=1.0, format="mxfp4"), "scale: expected a torch.Tensor, got"),
        (dict(data=zeros(16), scale=zeros(1), format="fp4"), "format: expected one of 'mxfp4', "),
        (dict(data=zeros(16), scale=zeros(1), format=None), "format: expected .*, got None"),
        (dict(data=zeros(16, dtype=torch.int8), scale=zeros(1), format="mxfp4"), "data: .*uint8 f"),
        (dict(data=zeros(), scale=zeros(), format="mxfp4"), "data: expected at least one dim"),
        (dict(data=zeros(2, 0), scale=zeros(2, 0), format="mxfp4"), "data: .* not empty"),
        (dict(data=zeros(0), scale=zeros(dtype=torch.float32), format="fp8"), "data: .*float8"),
        (dict(data=zeros(16), scale=zeros(1, dtype=BF16), format="mxfp4"), "scale: .*uint8"),
        (dict(data=zeros(64), scale=zeros(1), format="int4"), "scale: .*bfloat16"),
        (dict(data=zeros(8), scale=zeros(1, dtype=BF16), format="nvfp4"), "scale: .*float8_e4m3fn"),
        (dict(data=zeros(16), scale=zeros(1, device="meta"), format="mxfp4"), "scale: .*device"),
        (dict(data=zeros(2, 16), scale=zeros(3, 1), format="mxfp4"), r"scale: .*\[2\], got \[3, 1"),
        (dict(data=zeros(2, 16), scale=zeros(1), format="mxfp4"), "scale: expected leading dim"),
        (dict(data=zeros(16), scale=zeros(1), format="mxfp4", group_size=16), "group_size: .*32"),
        (dict(data=zeros(16), scale=zeros(1), format="mxfp4", group_size=32.0), "group_size: "),
        (dict(data=zeros(16), scale=zeros(2), format="mxfp4"), r"group_size: .*\(32,\).*got 16"),
        (dict(data=zeros(16), scale=zeros(0), format="mxfp4"), "group_size: .* got 0"),
        (dict(data=zeros(32), scale=zeros(1), format="mxfp4", group_size=32), "scale: expected 64"),
        (dict(data=zeros(8), scale=zeros(1), format="nvfp4", global_scale=1.0), "global_scale: "),
        (
            dict(data=zeros(8), scale=zeros(1), format="nvfp4", global_scale=zeros(dtype=BF16)),
            "global_scale: expected float32 on cpu, got torch.bfloat16",
        ),
        (
            dict(data=zeros(3, 8), scale=zeros(3, 1), format="nvfp4", global_scale=torch.ones(2)),
            r"global_scale: expected \[\] or the first leading dimensions of \[3, 8\], got \[2\]",
        ),
        (
            dict(
                data=zeros(3, 8), scale=zeros(3, 1), format="nvfp4", global_scale=torch.ones(3, 8)
            ),
            "global_scale: ",
        ),
        (
            dict(data=zeros(16), scale=zeros(1), format="mxfp4", global_scale=torch.ones(())),
            "global_scale: expected None for mxfp4",
        ),
        (
            dict(data=zeros(2, 4, dtype=F8), scale=torch.ones(3), format="fp8"),
            r"scale: expected \[\] or the leading dimensions",
        ),
        (
            dict(data=zeros(2, 4, dtype=F8), scale=torch.ones(2, 4), format="fp8"),
            "scale: expected",
        ),
        (
            dict(data=zeros(2, 4, dtype=F8), scale=torch.ones(2), format="fp8", group_size=4),
            "group_size: expected None for fp8, got 4",
        ),
    ],
)
def test_errors_of_the_constructor(arguments, message):
    with pytest.raises(InvalidCall, match=f"^{message}"):
        QuantizedTensor(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(x=[1.0], format="mxfp4"), "x: expected a torch.Tensor, got list"),
        (dict(x=torch.ones(32, dtype=torch.int32), format="mxfp4"), "x: .*floating.*int32"),
        (dict(x=torch.ones(()), format="mxfp4"), "x: .*rank 1 or more"),
        (dict(x=torch.ones(2, 48), format="mxfp4"), "x: .*positive multiple of 32, got 48"),
        (dict(x=torch.ones(2, 0), format="fp8"), "x: .*positive multiple of 1, got 0"),
        (dict(x=torch.ones(2, 32), format="mxfp8"), "format: expected one of 'mxfp4', 'nvfp4'"),
        (dict(x=torch.ones(2, 32), format="mxfp4", group_size=16), "group_size: .*got 16"),
        (dict(x=torch.ones(2, 32), format="int4", group_size="32"), "group_size: .*got '32'"),
        (dict(x=torch.ones(2, 32), format="fp8", group_size=32), "group_size: expected None"),
        (dict(x=torch.ones(2, 64), format="int4"), "x: .*positive multiple of 128, got 64"),
        (dict(x=torch.ones(2, 32), format="mxfp4", global_scale=1.0), "global_scale: .*None for"),
        (dict(x=torch.ones(2, 32), format="nvfp4", global_scale=0.0), "global_scale: .*got 0.0"),
        (dict(x=torch.ones(2, 32), format="nvfp4", global_scale=-1), "global_scale: .*got -1"),
        (dict(x=torch.ones(2, 32), format="nvfp4", global_scale=1e-37), "global_scale: .*2\\^-118"),
        (dict(x=torch.ones(2, 32), format="nvfp4", global_scale=float("nan")), "global_scale: "),
        (dict(x=torch.ones(2, 32), format="nvfp4", global_scale=float("inf")), "global_scale: "),
        (dict(x=torch.ones(2, 32), format="nvfp4", global_scale="1"), "global_scale: .*Tensor"),
        (
            dict(x=torch.ones(2, 32), format="nvfp4", global_scale=torch.ones(3)),
            "global_scale: .*got \\[3\\]",
        ),
        (
            dict(x=torch.ones(2, 32), format="nvfp4", global_scale=torch.ones(()).double()),
            "global_scale: .*float32",
        ),
    ],
)
def test_errors_of_quantize(arguments, message):
    with pytest.raises(InvalidCall, match=f"^{message}"):
        cutemoe.quantize(**arguments)


def test_find_format_names_the_argument():
    assert find_format("int4") is FORMATS["int4"]
    with pytest.raises(InvalidCall, match=r"^weights: expected one of"):
        find_format("x", "weights")


def test_broken_scales():
    data = zeros(2, 16)
    assert broken_scales(QuantizedTensor(data, zeros(2, 1) + 254, format="mxfp4")) is None
    assert broken_scales(QuantizedTensor(data, zeros(2, 1) + 255, format="mxfp4")) == "NaN in scale"
    int4 = zeros(2, 1, dtype=BF16)
    for value, why in ((torch.inf, "infinity in scale"), (-1.0, "negative scale")):
        int4[1, 0] = value
        assert broken_scales(QuantizedTensor(zeros(2, 64), int4, format="int4")) == why
    for value, why in (
        (torch.nan, "NaN in global_scale"),
        (torch.inf, "infinity in global_scale"),
        (-1.0, "negative global_scale"),
    ):
        q = QuantizedTensor(data, zeros(2, 2), torch.tensor(value), format="nvfp4")
        assert broken_scales(q) == why
