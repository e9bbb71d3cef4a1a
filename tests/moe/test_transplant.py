"""The PTX that is shipped for sm_120a, run on SM90 with its two FP4 instructions replaced.

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
from cutemoe.runtime.device import Device
from tests import strategies as draw
from tests.close import assert_same
from tests.compile.cute_nvfp4 import ask
from tests.compile.transplant import transplanted
from tests.moe.cases import Target, random_layer
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

    def launch(self, grid: int, block: int, shared: int, *args: Any) -> None:
        fields = [f for a in args if (f := packed(a)) is not None]
        assert [len(f) for f in fields] == self.sizes
        values = [ctypes.create_string_buffer(f, len(f)) for f in fields]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        attribute = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.ok(self.driver.cuFuncSetAttribute(self.function, attribute, shared))
        stream = torch.cuda.current_stream().cuda_stream
        self.ok(
            self.driver.cuLaunchKernel(
                self.function, grid, 1, 1, block, 1, 1, shared, stream,
                ctypes.addressof(pointers), 0,
            )
        )  # fmt: skip
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


@pytest.mark.parametrize(
    ("tokens", "H", "I", "gated", "gate_up"),
    [
        (9, 544, 208, True, "interleaved"),
        (150, 320, 144, True, "up_gate"),
        (400, 1040, 272, False, "gate_up"),
        (400, 512, 256, True, "gate_up"),
    ],
)
def test_shipped_ptx_gives_the_bits_of_the_emulation(tokens, H, I, gated, gate_up):  # noqa: E741
    from cutemoe.moe import cute_nvfp4_launch as launch
    from cutemoe.moe.api import _tensors
    from cutemoe.moe.cute_nvfp4_launch import _codes, _params, _scales, complete
    from cutemoe.moe.workspace import layout_of

    layer = random_layer("nvfp4", "nvfp4", E=4, H=H, I=I, gated=gated, gate_up=gate_up, seed=5)
    moe = layer.prepared(GPU)
    activation = cutemoe.SwiGLU(1.702, 1.0, 7.0) if gated else cutemoe.ReLU2()
    r = draw.Routing(T=tokens, K=2, E=4, offset=0, pattern="skewed", seed=tokens)
    x, ids, weights = GPU.put((draw.normal((tokens, H), 7, torch.bfloat16), r.ids(), r.weights()))
    space = cutemoe.Workspace.for_moe(moe, tokens, 2)
    call = {"activation": activation, "workspace": space, "backend": "cute_nvfp4"}
    want = cutemoe.fused_moe(x, moe, ids, weights, **call)
    t, _ = _tensors(x, moe, ids, weights, activation, None, space, "cute_nvfp4")
    problem = Problem.of(
        t, activations="nvfp4", gate_up=gate_up, activation="swiglu" if gated else "relu2",
        expert_offset=0, deterministic=True, rounding="fused",
    )  # fmt: skip
    device = replace(Device.of(x.device), arch=120)
    c = complete(cute_nvfp4_plan.configure(problem, device), t)
    w = layout_of(problem).views(space.buffer)
    live = int(w["expert_start"][-1])
    tiles = (Tiles(w["tiles"]), w["tile_count"], w["sorted_slots"])
    mid = _codes(w, "midq")
    # y has overwritten the codes of x
    w["xq"], w["xq_scale"] = torch.empty_like(w["xq"]), torch.empty_like(w["xq_scale"])
    xq = _codes(w, "xq")
    rows = (w["sorted_slots"], w["expert_start"])
    emulated = replace(c.quantise, arch=Device.of(x.device).arch)
    launch.quantise(emulated)(x, ids, *rows, t.input_scale1, xq[2], xq[1], 0)
    with Poison("cuda") as poison:

        def fresh(t: torch.Tensor) -> torch.Tensor:
            return poison.empty(t.shape, t.dtype)

        codes, scales = fresh(xq[2]), fresh(xq[1])
        run("build_quantise", c.quantise, 2 * tokens, 128, 0, x, ids, w["sorted_slots"],
            w["expert_start"], t.input_scale1, codes, scales, 0)  # fmt: skip
        assert_same(codes[:live], xq[2][:live], "codes of x")
        assert_same(scales[:live], xq[1][:live], "scales of x")
        tile = c.fc1.tile
        most = most_tiles(problem, tile.block_m)
        codes, scales = fresh(mid[2]), fresh(mid[1])
        run("build_fc1", c.fc1, most * -(-I // c.fc1.outputs), tile.threads, tile.smem_bytes,
            (xq[0], xq[3], t.w13.data, _scales(t.w13.scale)), tiles,
            (t.w13.factor, t.input_scale1, t.input_scale2), t.b13, _params(t),
            (codes, scales))  # fmt: skip
        assert_same(codes[:live], mid[2][:live], "codes of the FC1 output")
        assert_same(scales[:live], mid[1][:live], "scales of the FC1 output")
        y, out, combiners = fresh(w["y"]), fresh(t.out), launch._combiners(problem, c, w["y"])
        items = most * -(-y.shape[1] // c.fc2.gemm.outputs) + combiners
        # one item's number beside the stages
        shared = tile.smem_bytes + 4
        run("build_fc2", c.fc2, items * -(-H // y.shape[1]), tile.threads, shared,
            (mid[0], mid[3], t.w2.data, _scales(t.w2.scale)), tiles,
            (t.w2.factor, t.input_scale2), t.b2, y, (ids, weights, out),
            torch.zeros_like(w["sync"]), (0, 4, combiners))  # fmt: skip
        assert_same(out, want)


def run(build: str, config: Any, grid: int, block: int, shared: int, *args: Any) -> None:
    """Compiles for sm_120a, replaces the two instructions, launches."""
    ptx, mmas, conversions = transplanted(ask(build, config, "sm_120a")["ptx"])
    assert (mmas > 0) == (build != "build_quantise") and (conversions > 0) == (build != "build_fc2")
    Kernel(ptx).launch(grid, block, shared, *flat(*args))
