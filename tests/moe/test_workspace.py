"""Scratch memory: parts that do not overlap, sizes that suffice, guards that hold."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cutemoe
from cutemoe.moe.workspace import ALIGNMENT, MIN_TILE_ROWS, layout, max_tiles, y_parts
from tests import strategies as draw
from tests.close import assert_same
from tests.moe.cases import SATURATED, W4A16, exact_layer, exact_x
from tests.poison import Poison, kept

KINDS = st.sampled_from([("bf16", False), ("fp16", False), ("fp8", False), ("fp8", True)])
KINDS |= st.sampled_from(
    [("nvfp4", True), ("nvfp4", True, "sm120_fp4"), ("mxfp4", False, "sm120_fp4")]
)
KINDS |= st.sampled_from([("bf16", False, "sm120_fp4"), ("fp16", False, "sm120_fp4")])
KINDS |= st.sampled_from([("bf16", False, "sm90_rs_w4"), ("fp16", False, "sm90_rs_w4_fp16")])
KINDS |= st.sampled_from([("fp8", static, "sm90_rs_w4_fp8") for static in (False, True)])


@given(
    T=st.integers(0, 70),
    K=st.integers(1, 8),
    E=st.integers(1, 64),
    H=draw.multiples(16, 8),
    I=draw.multiples(16, 8),
    kind=KINDS,
)
def test_parts_are_aligned_and_apart(T, K, E, H, I, kind):  # noqa: E741
    plan = layout(T, K, E, H, I, *kind)
    buffer = torch.empty(plan.nbytes, dtype=torch.uint8)
    end, parted = 0, kind[2:] == ("sm120_fp4",)
    codes = parted and "xq" in plan.parts
    assert codes == (parted and kind[0] in ("nvfp4", "mxfp4"))
    for name, part in plan.parts.items():
        if name == "y" and codes:
            # nobody reads xq and its scales any more
            assert part.offset == plan.parts["xq"].offset > plan.parts["midq_scale"].offset
        elif name == "x_tiles":
            # nobody needs y yet
            assert part.offset == plan.parts["y"].offset
            assert part.offset + part.view(buffer).nbytes <= end
            continue
        else:
            assert part.offset % ALIGNMENT == 0 and part.offset >= end, name
        end = part.offset + part.view(buffer).nbytes
        assert end <= plan.nbytes
    slots, columns = y_parts(T * K, H) if parted else (1, H)
    assert plan.views(buffer)["y"].shape == (slots * T * K, columns)


@given(
    T=st.integers(1, 40),
    K=st.integers(1, 6),
    less=st.integers(0, 40),
    fewer=st.integers(0, 5),
    kind=KINDS,
)
def test_a_smaller_call_fits(T, K, less, fewer, kind):
    small = layout(max(T - less, 0), max(K - fewer, 1), 9, 64, 64, *kind)
    assert small.nbytes <= layout(T, K, 9, 64, 64, *kind).nbytes


@given(rows=st.lists(st.integers(0, 50), min_size=1, max_size=12))
def test_max_tiles_is_enough(rows):
    needed = sum(-(-n // MIN_TILE_ROWS) for n in rows)
    assert needed <= max_tiles(sum(rows), len(rows))


@pytest.mark.parametrize(
    ("format", "activations"), [("mxfp4", "bf16"), ("int4", "fp8"), ("nvfp4", "nvfp4"), W4A16]
)
@pytest.mark.parametrize("tokens", [5, 2])
def test_a_call_keeps_to_its_workspace_and_its_rows(target, format, activations, tokens):
    layer = exact_layer(format, activations)
    moe = layer.prepared(target)
    r = draw.Routing(T=tokens, K=2, E=5, offset=0, pattern="skips", seed=6)
    x, ids, weights = target.put((exact_x(tokens, layer, 2), r.ids(), r.weights(exact=True)))
    kwargs = {"activation": SATURATED, "backend": target.backend}
    target.willing("fused_moe", x, moe, ids, weights, **kwargs)
    want = cutemoe.fused_moe(x, moe, ids, weights, **kwargs)
    size = cutemoe.Workspace.for_moe(moe, 5, 2).nbytes
    with Poison(target.device) as poison:
        space = cutemoe.Workspace(poison.empty((size,), torch.uint8))
        out = poison.empty(x.shape, x.dtype, strides=(layer.hidden + 24, 1))
        with kept(x=x, ids=ids, weights=weights, w13=moe.w13.data, w2=moe.w2.data):
            for _ in range(2):
                got = cutemoe.fused_moe(x, moe, ids, weights, out=out, workspace=space, **kwargs)
        assert got is out
        assert_same(got, want)


def test_the_message_says_how_many_bytes_are_needed():
    layer = exact_layer("mxfp4")
    moe = layer.prepared()
    space = cutemoe.Workspace.for_moe(moe, 2, 2)
    needed = cutemoe.Workspace.for_moe(moe, 3, 2).nbytes
    r = draw.Routing(T=3, K=2, E=5, offset=0, pattern="uniform", seed=6)
    with pytest.raises(cutemoe.InvalidCall, match=rf"{needed} bytes.*got {space.nbytes} bytes"):
        cutemoe.fused_moe(exact_x(3, layer, 1), moe, r.ids(), r.weights(), workspace=space)


@pytest.mark.parametrize(("format", "activations"), [("mxfp4", "bf16"), ("nvfp4", "nvfp4"), W4A16])
@pytest.mark.parametrize("strides", ["x", "ids", "weights", "out"])
def test_rows_may_have_any_stride(target, format, activations, strides):
    layer = exact_layer(format, activations)
    moe = layer.prepared(target)
    r = draw.Routing(T=5, K=2, E=5, offset=0, pattern="uniform", seed=6)
    given_ = {"x": exact_x(5, layer, 2), "ids": r.ids(), "weights": r.weights(exact=True)}
    given_ = {name: target.put(t) for name, t in given_.items()}
    kwargs = {"activation": SATURATED, "backend": target.backend}
    target.willing("fused_moe", moe=moe, **given_, **kwargs)
    want = cutemoe.fused_moe(moe=moe, **given_, **kwargs)
    with Poison(target.device) as poison:
        given_["out"] = torch.empty_like(want)
        t = given_[strides]
        given_[strides] = poison.of(t, strides=(t.shape[1] + 3, 1))
        assert_same(cutemoe.fused_moe(moe=moe, **given_, **kwargs), want)
