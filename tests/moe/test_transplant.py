"""The PTX that is shipped for sm_120a, run on SM90 with its FP4 instructions replaced.

Copies, addresses, barriers, order and epilogues are the compiler's for sm_120a; what is not says
tests/compile/transplant.py. Results equal those of the emulated kernels bit for bit.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import cutemoe
from cutemoe.moe import cute_nvfp4_plan
from cutemoe.moe.cute_nvfp4_plan import most_tiles
from cutemoe.moe.problem import Problem
from cutemoe.moe.workspace import layout_of
from cutemoe.runtime.device import Device
from tests import strategies as draw
from tests.close import assert_same
from tests.compile.cute_nvfp4 import ask
from tests.compile.transplant import transplanted
from tests.moe.cases import FP4, Target, random_layer
from tests.moe.test_cute_nvfp4 import LAYERS
from tests.poison import Poison

pytest.importorskip("cutlass")
pytestmark = pytest.mark.gpu
GPU = Target("cute_nvfp4", "cuda")


class Kernel:
    """A kernel from PTX, launched through the driver; arguments as the DSL's kernels take them."""

    def __init__(self, ptx: str) -> None:
        import cuda.bindings.driver as driver

        self.driver = driver
        found = re.search(r"\.visible \.entry (\w+)\((.*?)\)", ptx, re.DOTALL)
        assert found is not None
        # bytes of every parameter
        parameter = r"\.param (?:\.align \d+ )?\.\w(\d+) \w+?(?:\[(\d+)\])?[,\s]"
        declared = re.findall(parameter, found[2] + "\n")
        self.sizes = [int(length) if length else int(bits) // 8 for bits, length in declared]
        self.module = self.ok(driver.cuModuleLoadData(ptx.encode() + b"\0"))
        self.function = self.ok(driver.cuModuleGetFunction(self.module, found[1].encode()))

    def ok(self, answer: tuple[Any, ...]) -> Any:
        assert answer[0] == self.driver.CUresult.CUDA_SUCCESS, answer
        return answer[1] if len(answer) > 1 else None

    def launch(
        self, grid: int, block: int, shared: int, *args: Any, together: bool = False
    ) -> None:
        """together: all CTAs at once, as a cooperative launch."""
        fields = [f for a in args if (f := packed(a)) is not None]
        assert [len(f) for f in fields] == self.sizes
        values = [ctypes.create_string_buffer(f, len(f)) for f in fields]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        attribute = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.ok(self.driver.cuFuncSetAttribute(self.function, attribute, shared))
        stream = torch.cuda.current_stream().cuda_stream
        sizes = (grid, 1, 1, block, 1, 1, shared, stream, ctypes.addressof(pointers))
        if together:
            self.ok(self.driver.cuLaunchCooperativeKernel(self.function, *sizes))
        else:
            self.ok(self.driver.cuLaunchKernel(self.function, *sizes, 0))
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Tiles:
    """A tensor whose number of columns is known when the kernel is compiled."""

    t: torch.Tensor


def packed(a: Any) -> bytes | None:
    """A tensor: address, sizes in 32 bits, strides in 64; a number; None is no parameter."""
    if a is None:
        return None
    if isinstance(a, float):
        return bytes(ctypes.c_float(a))
    if isinstance(a, int):
        return bytes(ctypes.c_int32(a))
    a, sizes = (a.t, a.t.shape[:-1]) if isinstance(a, Tiles) else (a, a.shape)
    out = bytes(ctypes.c_uint64(a.data_ptr()))
    out += b"".join(bytes(ctypes.c_int32(n)) for n in sizes)
    if a.ndim > 1:
        out += bytes(-len(out) % 8)
        out += b"".join(bytes(ctypes.c_int64(s)) for s in a.stride()[:-1])
    return out + bytes(-len(out) % 8)


def flat(*args: Any) -> list[Any]:
    return [x for a in args for x in (flat(*a) if isinstance(a, tuple) else [a])]


@dataclass(frozen=True)
class Call:
    """A layer's tensors, its stages for sm_120a, and what the emulation left in the workspace."""

    problem: Problem
    config: Any
    t: Any
    w: dict[str, torch.Tensor]
    args: tuple[torch.Tensor, ...]
    want: torch.Tensor


def emulated(kind, tokens, H, I, gated, gate_up):  # noqa: E741
    """One call by the emulated kernels; x is quantised again, as y has overwritten its codes."""
    from cutemoe.moe import cute_nvfp4_launch as launch
    from cutemoe.moe.api import _tensors

    format, activations = LAYERS[kind]
    block = {"nvfp4": 16, "mxfp4": 32}[format]
    H, I = (-(-n // block) * block for n in (H, I))  # noqa: E741
    layer = random_layer(format, activations, E=4, H=H, I=I, gated=gated, gate_up=gate_up, seed=5)
    moe = layer.prepared(GPU)
    activation = cutemoe.SwiGLU(1.702, 1.0, 7.0) if gated else cutemoe.ReLU2()
    r = draw.Routing(T=tokens, K=2, E=4, offset=0, pattern="skewed", seed=tokens)
    args = GPU.put((draw.normal((tokens, H), 7, torch.bfloat16), r.ids(), r.weights()))
    x, ids, weights = args
    space = cutemoe.Workspace.for_moe(moe, tokens, 2)
    call = {"activation": activation, "workspace": space, "backend": "cute_nvfp4"}
    want = cutemoe.fused_moe(x, moe, ids, weights, **call)
    t, _ = _tensors(x, moe, ids, weights, activation, None, space, "cute_nvfp4")
    problem = Problem.of(
        t, activations=activations, gate_up=gate_up, activation="swiglu" if gated else "relu2",
        expert_offset=0, deterministic=True,
    )  # fmt: skip
    here = Device.of(x.device)
    c = launch.complete(cute_nvfp4_plan.configure(problem, replace(here, arch=120)), t)
    w = layout_of(problem).views(space.buffer)
    if not c.fc1.numbers:
        w["xq"], w["xq_scale"] = torch.empty_like(w["xq"]), torch.empty_like(w["xq_scale"])
        xq = launch._codes(w, "xq")
        rows = (w["sorted_slots"], w["expert_start"])
        quantise = launch.quantise(replace(c.quantise, arch=here.arch))
        quantise(x, ids, *rows, t.input_scale1, xq[2], xq[1], 0)
    return Call(problem, c, t, w, args, want)


SIZES = pytest.mark.parametrize(
    ("tokens", "H", "I", "gated", "gate_up"),
    [
        (9, 544, 208, True, "interleaved"),
        (150, 320, 144, True, "up_gate"),
        (400, 1040, 272, False, "gate_up"),
        (400, 512, 256, True, "gate_up"),
    ],
)


@pytest.mark.parametrize("kind", FP4)
@SIZES
def test_shipped_ptx_gives_the_bits_of_the_emulation(kind, tokens, H, I, gated, gate_up):  # noqa: E741
    from cutemoe.moe import cute_nvfp4_launch as launch

    call = emulated(kind, tokens, H, I, gated, gate_up)
    c, t, w = call.config, call.t, call.w
    x, ids, _ = call.args
    live = int(w["expert_start"][-1])
    xq, mid = launch._codes(w, "xq"), launch._codes(w, "midq")
    with Poison("cuda") as poison:
        sorts(call, poison)
        codes, scales = (poison.empty(q.shape, q.dtype) for q in (xq[2], xq[1]))
        run("build_quantise", c.quantise, 2 * tokens, 128, 0, x, ids, w["sorted_slots"],
            w["expert_start"], t.input_scale1, codes, scales, 0)  # fmt: skip
        assert_same(codes[:live], xq[2][:live], "codes of x")
        assert_same(scales[:live], xq[1][:live], "scales of x")
        codes, scales = (poison.empty(q.shape, q.dtype) for q in (mid[2], mid[1]))
        multipliers = (t.w13.factor, t.input_scale1, t.input_scale2)
        first_gemm(call, (xq[0], xq[3]), multipliers, (codes, scales))
        assert_same(codes[:live], mid[2][:live], "codes of the FC1 output")
        assert_same(scales[:live], mid[1][:live], "scales of the FC1 output")
        second_gemm(call, poison, (mid[0], mid[3]), (t.w2.factor, t.input_scale2))


@SIZES
def test_shipped_ptx_of_16_bit_activations_gives_the_same_bits(tokens, H, I, gated, gate_up):  # noqa: E741
    """Nothing in it is replaced: what runs is the text for sm_120a, but for its target."""
    call = emulated("w4a16", tokens, H, I, gated, gate_up)
    t, mid = call.t, call.w["mid"]
    live = int(call.w["expert_start"][-1])
    with Poison("cuda") as poison:
        sorts(call, poison)
        found = poison.empty(mid.shape, mid.dtype)
        first_gemm(call, (call.args[0], 2), (t.w13.factor, None, None), (found,))
        assert_same(found[:live], mid[:live], "FC1 output")
        second_gemm(call, poison, (mid,), (t.w2.factor, None))


def sorts(call: Call, poison: Poison) -> None:
    """Rows and tiles, as the emulation's launch left them; counters are zeros."""
    w = call.w
    names = ("sorted_slots", "expert_start", "tiles", "tile_count", "sync")
    slots, start, tiles, count, sync = (poison.empty(w[n].shape, w[n].dtype) for n in names)
    block_m = call.config.fc1.tile.block_m
    run("build_sort", call.config.sort, 1, 512, 4 * call.config.sort.bins, call.args[1],
        (slots, start, Tiles(tiles), count), sync, (0, 4, block_m))  # fmt: skip
    live = int(w["expert_start"][-1])
    assert_same(slots[:live], w["sorted_slots"][:live], "sorted slots")
    assert_same(start, w["expert_start"])
    assert_same(count, w["tile_count"])
    assert_same(tiles[: int(count)], w["tiles"][: int(count)], "tiles")
    assert not sync.any()


def first_gemm(
    call: Call, left: tuple[Any, ...], multipliers: tuple[Any, ...], result: tuple[Any, ...]
) -> None:
    """FC1, one CTA for each that may be needed."""
    from cutemoe.moe import cute_nvfp4_launch as launch

    c, t, w, tile = call.config.fc1, call.t, call.w, call.config.fc1.tile
    most = most_tiles(call.problem, tile.block_m) * -(-call.problem.intermediate // c.outputs)
    tiles = (Tiles(w["tiles"]), w["tile_count"], w["sorted_slots"])
    run("build_fc1", c, most, tile.threads, tile.smem_bytes,
        (*left, t.w13.data, launch._scales(t.w13.scale)), tiles, multipliers, t.b13,
        launch._params(t), result)  # fmt: skip


def second_gemm(
    call: Call, poison: Poison, left: tuple[Any, ...], multipliers: tuple[Any, ...]
) -> None:
    """FC2 and the sums of tokens, whose bits are compared."""
    from cutemoe.moe import cute_nvfp4_launch as launch

    c, t, w, tile = call.config, call.t, call.w, call.config.fc1.tile
    _, ids, weights = call.args
    y, out = (poison.empty(a.shape, a.dtype) for a in (w["y"], t.out))
    combiners = launch._combiners(call.problem, c, y)
    columns, most = y.shape[1], most_tiles(call.problem, tile.block_m)
    items = (most * -(-columns // c.fc2.gemm.outputs) + combiners) * -(-t.x.shape[1] // columns)
    tiles = (Tiles(w["tiles"]), w["tile_count"], w["sorted_slots"])
    # one item's number beside the stages
    run("build_fc2", c.fc2, items, tile.threads, tile.smem_bytes + 4,
        (*left, t.w2.data, launch._scales(t.w2.scale)), tiles, multipliers, t.b2, y,
        (ids, weights, out), torch.zeros_like(w["sync"]), (0, 4, combiners))  # fmt: skip
    assert_same(out, call.want)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("tokens", [9, 150])
def test_shipped_ptx_of_a_whole_layer_gives_the_bits_of_the_emulation(kind, tokens, dynamic):
    call = emulated(kind, tokens, 544, 224, True, "interleaved")
    with Poison("cuda") as poison:
        w = {name: poison.empty(p.shape, p.dtype) for name, p in call.w.items()}
        out = poison.empty(call.t.out.shape, call.t.out.dtype)
        config = replace(call.config, dynamic=dynamic)
        tile = config.fc1.tile
        w["sync"].zero_()
        # one item's number beside the stages
        run("build_fused", config, 5, tile.threads, tile.smem_bytes + 4,
            *whole_layer(call, w, out), together=True)  # fmt: skip
        assert_same(out, call.want)


def whole_layer(call: Call, w: dict[str, torch.Tensor], out: torch.Tensor) -> tuple[Any, ...]:
    """Arguments of the kernel of a layer, with 5 CTAs."""
    from cutemoe.moe import cute_nvfp4_launch as launch

    t, c = call.t, call.config
    x, ids, weights = call.args
    w13 = (t.w13.data, launch._scales(t.w13.scale), t.w13.factor, t.input_scale1, t.input_scale2)
    return (
        (x, ids, weights, out, w["y"]),
        (w["sorted_slots"], w["expert_start"], Tiles(w["tiles"]), w["tile_count"]),
        None if c.fc1.numbers else launch._codes(w, "xq"),
        (*w13, t.b13, launch._params(t)),
        (w["mid"],) if c.fc1.numbers else launch._codes(w, "midq"),
        (t.w2.data, launch._scales(t.w2.scale), t.w2.factor, t.b2),
        w["sync"],
        (0, 4, launch._combiners(call.problem, c, w["y"]), c.fc1.tile.block_m),
    )


def run(
    build: str, config: Any, grid: int, block: int, shared: int, *args: Any, together: bool = False
) -> None:
    """Compiles for sm_120a, replaces the FP4 instructions if there are any, launches."""
    ptx, mmas, conversions = transplanted(ask(build, config, "sm_120a")["ptx"])
    gemm = {"build_fc1": "fc1", "build_fc2": "gemm", "build_fused": "fc1"}.get(build)
    codes = gemm is None or not getattr(config, gemm, config).numbers
    assert (mmas > 0) == (codes and gemm is not None)
    assert (conversions > 0) == (codes and build not in ("build_sort", "build_fc2"))
    Kernel(ptx).launch(grid, block, shared, *flat(*args), together=together)
