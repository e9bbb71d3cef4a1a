"""Every registered layout moves bytes and loses none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cutemoe
from cutemoe import InvalidCall
from cutemoe.layouts import LAYOUTS, ORDERS, reorder
from tests import strategies as draw
from tests.close import assert_same

layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=lambda v: v.name)


def same_multiset(packed: torch.Tensor, w: torch.Tensor) -> bool:
    """The same bytes in another order, padded with zero bytes."""
    counts = torch.bincount(packed.flatten().long(), minlength=256)
    counts[0] -= packed.numel() - w.numel()
    return torch.equal(counts, torch.bincount(w.flatten().long(), minlength=256))


@layouts
@given(
    lead=draw.leading(dims=2),
    rows=st.integers(0, 150),
    columns=st.integers(0, 9),
    seed=draw.seeds(),
)
def test_a_layout_moves_bytes_and_loses_none(layout, lead, rows, columns, seed):
    shape = (*lead, rows * layout.rows, columns * layout.columns)
    w = draw.random_bytes(shape, seed)
    packed = layout.pack(w)
    assert packed.is_contiguous() and tuple(packed.shape) == tuple(layout.moved(shape))
    assert same_multiset(packed, w)
    assert_same(layout.unpack(packed, shape), w)


@layouts
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.int32])
def test_a_layout_takes_any_dtype(layout, dtype):
    w = draw.random_bytes((2, 4 * layout.rows, 4 * layout.columns * dtype.itemsize), 1).view(dtype)
    packed = layout.pack(w)
    assert packed.dtype == dtype
    back = layout.unpack(packed, tuple(w.shape))
    assert torch.equal(back.view(torch.uint8), w.contiguous().view(torch.uint8))


@layouts
def test_a_layout_takes_strided_and_meta_tensors(layout):
    w = draw.random_bytes((3, 8 * layout.columns, 6 * layout.rows), 2).transpose(1, 2)
    assert_same(layout.unpack(layout.pack(w), tuple(w.shape)), w.contiguous())
    packed = layout.pack(w.to("meta"))
    assert tuple(packed.shape) == tuple(layout.moved(tuple(w.shape)))


@layouts
def test_errors_of_a_layout(layout):
    with pytest.raises(InvalidCall, match=r"^x: expected \[..., rows, columns\]"):
        layout.pack(torch.zeros(4))
    w = torch.zeros(4, 4)
    with pytest.raises(InvalidCall, match=r"^packed: expected"):
        layout.unpack(layout.pack(w), (4, 6))
    with pytest.raises(InvalidCall, match=r"^shape: expected"):
        layout.unpack(layout.pack(w), (16,))
    if layout.rows > 1:
        with pytest.raises(InvalidCall, match=r"^x: "):
            layout.pack(torch.zeros(layout.rows + 1, 4))


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (128, 4), (129, 5), (300, 18), (256, 8)])
def test_block_scales_sit_where_the_formula_says(rows, blocks):
    scales = draw.random_bytes((rows, blocks), 3)
    packed = LAYOUTS["sm120_block_scale"].pack(scales).flatten()
    tiles = -(-blocks // 4)
    assert packed.numel() == -(-rows // 128) * tiles * 512
    for r in range(rows):
        for b in range(blocks):
            offset = (r // 128 * tiles + b // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + b % 4
            assert packed[offset] == scales[r, b]


def test_block_scales_of_experts_are_packed_one_by_one():
    layout, scales = LAYOUTS["sm120_block_scale"], draw.random_bytes((3, 130, 6), 4)
    for e, packed in enumerate(layout.pack(scales)):
        assert_same(packed, layout.pack(scales[e]))


ROWS_OF = {
    "gate_up": lambda j, i: (j, i + j),
    "up_gate": lambda j, i: (i + j, j),
    "interleaved": lambda j, i: (2 * j, 2 * j + 1),
}


@pytest.mark.parametrize("source", ORDERS)
@pytest.mark.parametrize("target", ORDERS)
@given(intermediate=st.integers(0, 6), seed=draw.seeds())
def test_reorder_puts_gate_and_up_rows_in_their_places(source, target, intermediate, seed):
    w = draw.normal((2, 2 * intermediate, 3), seed)
    moved = reorder(w, source, target)
    for j in range(intermediate):
        for a, b in zip(
            ROWS_OF[source](j, intermediate), ROWS_OF[target](j, intermediate), strict=True
        ):
            assert_same(moved[:, b], w[:, a])
    bias = draw.normal((2, 2 * intermediate), seed)
    assert_same(
        reorder(bias, source, target, dim=-1), reorder(bias[..., None], source, target)[..., 0]
    )
    assert_same(reorder(moved, target, source), w)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int4", "fp8"])
@pytest.mark.parametrize("target", ORDERS)
def test_reorder_of_quantized_weights(format, target):
    x = draw.normal((3, 8, 128), 5)
    q = cutemoe.quantize(x, format)
    assert_same(
        reorder(q, "gate_up", target).dequantize(), reorder(q.dequantize(), "gate_up", target)
    )
    assert reorder(q, "gate_up", target).group_size == q.group_size


@pytest.mark.parametrize("shape", [(), (3,), (3, 8)])
def test_reorder_moves_scales_of_rows_only(shape):
    x, d = draw.normal((3, 8, 16), 6), draw.powers_of_two(shape, 7)
    nvfp4 = cutemoe.quantize(x, "nvfp4", global_scale=d)
    fp8 = cutemoe.QuantizedTensor(x.to(torch.float8_e4m3fn), d, format="fp8")
    for q in (nvfp4, fp8):
        moved = reorder(q, "interleaved", "up_gate")
        assert_same(moved.dequantize(), reorder(q.dequantize(), "interleaved", "up_gate"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(source="gate", target="gate_up"), "source: expected one of 'gate_up', 'up_gate'"),
        (dict(source="gate_up", target=None), "target: expected one of"),
        (dict(source="gate_up", target="up_gate", dim=0), "w: expected an even number of rows"),
        (dict(source="gate_up", target="up_gate", dim=5), "w: .*dimension 5"),
    ],
)
def test_errors_of_reorder(arguments, message):
    with pytest.raises(InvalidCall, match=f"^{message}"):
        reorder(torch.zeros(3, 4, 32), **arguments)
    if arguments.get("dim") is None:
        with pytest.raises(InvalidCall, match=f"^{message}"):
            reorder(cutemoe.quantize(torch.zeros(3, 4, 32), "mxfp4"), **arguments)


def test_reorder_of_a_quantized_tensor_moves_rows_only():
    q = cutemoe.quantize(torch.zeros(4, 4, 32), "mxfp4")
    with pytest.raises(InvalidCall, match=r"^dim: expected -2"):
        reorder(q, "gate_up", "up_gate", dim=0)
