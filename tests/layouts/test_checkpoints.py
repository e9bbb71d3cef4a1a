"""Checkpoint tensors in and out, exactly."""

import numpy as np
import pytest
import torch
from hypothesis import given

import cutemoe
from cutemoe import InvalidCall, QuantizedTensor
from cutemoe.formats import FORMATS
from cutemoe.layouts import CHECKPOINTS, join_rows, stack_experts
from tests import strategies as draw
from tests.close import assert_same

CASES = [(c, f) for c in CHECKPOINTS.values() for f in c.formats]
cases = pytest.mark.parametrize(
    ("checkpoint", "format"), CASES, ids=lambda v: getattr(v, "name", v)
)


def random_tensor(format: str, lead: tuple[int, ...], seed: int) -> QuantizedTensor:
    """Every byte of codes and scales; a power of two as the global scale."""
    f = FORMATS[format]
    data = draw.random_bytes((*lead, 128), seed)
    blocks = 256 // f.group_sizes[0]
    scale = draw.random_bytes((*lead, blocks * f.scale_dtype.itemsize), seed + 1)
    scale = scale.view(f.scale_dtype)
    if format == "int4":
        scale = torch.where(torch.isfinite(scale), scale, 1.0)
    g = draw.powers_of_two((), seed, -20, 3) if f.has_global else None
    return QuantizedTensor(data, scale, g, format=format)


def assert_same_tensor(a: QuantizedTensor, b: QuantizedTensor) -> None:
    assert (a.format, a.group_size, a.shape) == (b.format, b.group_size, b.shape)
    for x, y in ((a.data, b.data), (a.scale, b.scale)):
        assert_same(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
    assert (a.global_scale is None) == (b.global_scale is None)
    if a.global_scale is not None and b.global_scale is not None:
        assert_same(a.global_scale, b.global_scale)


@cases
@given(seed=draw.seeds(), lead=draw.leading(dims=2).map(lambda v: (*v, 2)))
def test_write_then_read(checkpoint, format, seed, lead):
    q = random_tensor(format, lead, seed)
    stored = checkpoint.write(q, "model.w")
    assert all(name.startswith("model.w") for name in stored)
    assert_same_tensor(checkpoint.read(stored, "model.w"), q)


@cases
def test_a_checkpoint_names_what_it_misses(checkpoint, format):
    stored = checkpoint.write(random_tensor(format, (2,), 1), "a")
    for name in stored:
        rest = {n: t for n, t in stored.items() if n != name}
        with pytest.raises(InvalidCall, match=f"^tensors: expected '{name}', got no such name"):
            checkpoint.read(rest, "a")
        with pytest.raises(InvalidCall, match=f"^{name}: expected torch"):
            checkpoint.read(stored | {name: stored[name].to(torch.complex64)}, "a")
    with pytest.raises(InvalidCall, match=r"^q: expected format"):
        checkpoint.write(cutemoe.quantize(torch.ones(2, 128), "fp8"), "a")


def test_a_missing_tensor_is_answered_with_similar_names():
    stored = CHECKPOINTS["modelopt"].write(random_tensor("nvfp4", (2,), 1), "layers.0.up_proj")
    with pytest.raises(InvalidCall, match=r"but \['layers.0.up_proj.weight'\]"):
        CHECKPOINTS["modelopt"].read(stored, "layers.1.up_proj")


def test_gpt_oss_blocks():
    """Value by value from the description of the format."""
    E, N, K = 2, 3, 64
    blocks = draw.random_bytes((E, N, K // 32, 16), 2)
    scales = draw.random_bytes((E, N, K // 32), 3) % 255
    tensors = {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales}
    q = CHECKPOINTS["gpt_oss"].read(tensors, "experts.down_proj")
    assert q.format == "mxfp4" and q.shape == (E, N, K)
    assert q.data.data_ptr() == blocks.data_ptr()
    values = q.dequantize(torch.float64)
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    for e, n, k in np.ndindex(E, N, K):
        byte = int(blocks[e, n, k // 32, k % 32 // 2])
        code = byte >> 4 if k % 2 else byte & 15
        want = (-1) ** (code >> 3) * table[code & 7] * 2.0 ** (int(scales[e, n, k // 32]) - 127)
        assert values[e, n, k] == want


@pytest.mark.parametrize("shape", [(16,), (2, 3, 16), (2, 2, 8)])
def test_gpt_oss_shapes(shape):
    tensors = {"w_blocks": draw.random_bytes(shape, 1), "w_scales": draw.random_bytes((2, 2), 1)}
    with pytest.raises(InvalidCall, match=r"^w_blocks: expected shape \[2, 2, 16\], from w_scales"):
        CHECKPOINTS["gpt_oss"].read(tensors, "w")


def test_modelopt_values():
    """value = code * weight_scale * weight_scale_2, and one multiplier for each expert."""
    w = {
        "w.weight": torch.tensor([[[0x21] * 8], [[0xF7] * 8]], dtype=torch.uint8),
        "w.weight_scale": torch.tensor([[[2.0]], [[0.5]]]).to(torch.float8_e4m3fn),
        "w.weight_scale_2": torch.tensor([0.25, 8.0]),
        "w.input_scale": torch.tensor(1.0),
    }
    got = CHECKPOINTS["modelopt"].read(w, "w").dequantize()
    assert_same(got[0, 0], torch.tensor([0.25, 0.5] * 8))
    assert_same(got[1, 0], torch.tensor([24.0, -24.0] * 8))
    w["w.weight_scale_2"] = torch.tensor(0.25)
    assert CHECKPOINTS["modelopt"].read(w, "w").dequantize()[1, 0, 0] == 0.75
    w["w.pre_quant_scale"] = torch.ones(16)
    with pytest.raises(InvalidCall, match=r"no 'w.pre_quant_scale'.*by channel"):
        CHECKPOINTS["modelopt"].read(w, "w")


def test_modelopt_writes_a_missing_global_scale_as_one():
    q = QuantizedTensor(
        torch.zeros(2, 8, dtype=torch.uint8),
        torch.ones(2, 1).to(torch.float8_e4m3fn),
        format="nvfp4",
    )
    assert CHECKPOINTS["modelopt"].write(q, "w")["w.weight_scale_2"] == 1.0


@given(seed=draw.seeds())
def test_compressed_tensors_words(seed):
    """int32 words built as the format describes: value + 8, the first code in the lowest bits."""
    g = np.random.default_rng(seed)
    values = g.integers(-8, 8, (3, 128))
    words = np.zeros((3, 16), dtype=np.uint32)
    for i in range(8):
        words |= (values[:, i::8] + 8).astype(np.uint32) << np.uint32(4 * i)
    tensors = {
        "w.weight_packed": torch.from_numpy(words.view(np.int32)),
        "w.weight_scale": torch.full((3, 1), 0.5).half(),
        "w.weight_shape": torch.tensor([3, 128]),
    }
    q = CHECKPOINTS["compressed_tensors"].read(tensors, "w")
    assert_same(q.dequantize(), torch.from_numpy(values).float() / 2)
    again = CHECKPOINTS["compressed_tensors"].write(q, "w")["w.weight_packed"]
    assert_same(again, tensors["w.weight_packed"])


def test_compressed_tensors_nvfp4_has_a_divisor():
    stored = {
        "w.weight_packed": torch.full((1, 8), 0x22, dtype=torch.uint8),
        "w.weight_scale": torch.full((1, 1), 448.0).to(torch.float8_e4m3fn),
        "w.weight_global_scale": torch.tensor([896.0]),
    }
    q = CHECKPOINTS["compressed_tensors"].read(stored, "w")
    assert_same(q.dequantize(), torch.full((1, 16), 0.5))
    many = QuantizedTensor(
        q.data.expand(2, 3, 8), q.scale.expand(2, 3, 1), torch.ones(2), format="nvfp4"
    )
    with pytest.raises(InvalidCall, match=r"^q.global_scale: expected a scalar.*got \[2\]"):
        CHECKPOINTS["compressed_tensors"].write(many, "w")


@pytest.mark.parametrize("name", ["int4_packed", "compressed_tensors"])
def test_int4_refusals(name):
    c = CHECKPOINTS[name]
    stored = c.write(random_tensor("int4", (2,), 1), "w")
    for extra in ("weight_zero_point", "weight_g_idx"):
        if name == "int4_packed" and extra == "weight_g_idx":
            continue
        with pytest.raises(InvalidCall, match=f"expected no 'w.{extra}'"):
            c.read(stored | {f"w.{extra}": torch.zeros(1)}, "w")
    inexact = torch.full((2, 2), 1 / 3)
    with pytest.raises(InvalidCall, match=r"^w.weight_scale: expected values that are exact in bf"):
        c.read(stored | {"w.weight_scale": inexact}, "w")


def test_signed_bytes_are_the_same_codes():
    q = random_tensor("int4", (2,), 1)
    stored = CHECKPOINTS["int4_packed"].write(q, "w")
    signed = stored | {"w.weight": q.data.view(torch.int8)}
    assert_same_tensor(CHECKPOINTS["int4_packed"].read(signed, "w"), q)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "int4", "fp8"])
def test_stack_and_join(format):
    x = draw.normal((3, 2, 4, 128), 1)
    d = 0.01 if format == "nvfp4" else None
    gate, up = (
        stack_experts([cutemoe.quantize(x[e, i], format, global_scale=d) for e in range(3)])
        for i in range(2)
    )
    w13 = join_rows([gate, up])
    assert w13.shape == (3, 8, 128)
    for e in range(3):
        assert_same(
            gate[e].dequantize(), cutemoe.quantize(x[e, 0], format, global_scale=d).dequantize()
        )
        assert_same(w13[e].dequantize()[:4], gate[e].dequantize())
        assert_same(w13[e].dequantize()[4:], up[e].dequantize())


def test_stacked_global_scales_are_one_for_each_expert():
    parts = [cutemoe.quantize(draw.normal((2, 32), s), "nvfp4") for s in range(3)]
    q = stack_experts(parts)
    assert q.global_scale is not None and q.global_scale.shape == (3,)
    for e in range(3):
        assert_same_tensor(q[e], parts[e])


def test_errors_of_stack_and_join():
    a = cutemoe.quantize(torch.ones(2, 32), "nvfp4")
    b = cutemoe.quantize(2 * torch.ones(2, 32), "nvfp4")
    for function, argument in ((stack_experts, "experts"), (join_rows, "parts")):
        with pytest.raises(InvalidCall, match=f"^{argument}: expected at least one tensor"):
            function([])
        with pytest.raises(InvalidCall, match=rf"^{argument}\[1\]: expected as {argument}\[0\]"):
            function([a, cutemoe.quantize(torch.ones(2, 32), "mxfp4")])
        with pytest.raises(InvalidCall, match=rf"^{argument}: expected tensors \[..., N, K\]"):
            function([cutemoe.quantize(torch.ones(32), "mxfp4")])
    with pytest.raises(InvalidCall, match=r"^parts\[1\].global_scale: expected that of parts\[0\]"):
        join_rows([a, b])
    data = torch.ones(2, 32).to(torch.float8_e4m3fn)
    one, two = (QuantizedTensor(data, torch.tensor(s), format="fp8") for s in (1.0, 2.0))
    with pytest.raises(InvalidCall, match=r"^parts\[1\].scale: expected that of parts\[0\]"):
        join_rows([one, two])
    assert join_rows([one, one]).scale.ndim == 0
