"""What recalled calls launch, beside what the same calls launch when they are checked.

The driver and the CuTe kernels only write down what they are given; tensors are on the CPU. Prints
for every case whether replays were made, and the launches of a first, recalled and checked call.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.pop(0)
tests = sys.modules["tests"] = types.ModuleType("tests")
tests.__path__ = [str(Path(__file__).parents[1])]

import cutemoe
from cutemoe.gdn import api as gdn_api
from cutemoe.gemm import api as gemm_api
from cutemoe.gemm.tensors import GemmTensors
from cutemoe.moe import api as moe_api
from cutemoe.runtime import driver, recall, replay
from cutemoe.runtime.device import Device
from tests import strategies as draw
from tests.gdn.cases import Case
from tests.moe.cases import random_layer

H200 = Device("cuda", 0, "card", 90, 132, 232448, True)
SCRATCH = (torch.empty(1, dtype=torch.int32), torch.empty(64, 3, dtype=torch.int32))
SEEN: list[Any] = []
REPLAYS: list[bool] = []


def on_a_card_that_notes() -> None:
    """Calls on CPU tensors go all the way to the driver."""
    from cutemoe.gemm import cute_launch

    Device.of = staticmethod(lambda _: H200)  # type: ignore
    recall.DEVICES, recall._current_device = ("cpu",), lambda: None
    torch._C._cuda_getDevice = lambda: 0
    driver.load = lambda cubin, name, *_: name  # type: ignore

    def launch(function, grid, threads, shared, index, pack, values, pdl):
        buffer = bytearray(4096)
        pack(memoryview(buffer), 0, *values)
        size = int.from_bytes(buffer[:8], sys.byteorder)
        SEEN.append([function, list(grid), threads, shared, pdl, buffer[: 8 + size].hex()])

    driver.launch = launch  # type: ignore
    cute_launch.kernel = lambda c: lambda *args: SEEN.append([str(c), told(args)])  # type: ignore
    # memory that a call makes is the same in all of them
    GemmTensors.with_scratch = lambda t, _: replace(t, scratch=SCRATCH)  # type: ignore
    GemmTensors.tiles = lambda t, most: SCRATCH  # type: ignore
    real = replay.Replay.of

    def of(launches: Any, roles: Any) -> Any:
        made = real(launches, roles)
        REPLAYS.append(made is not None)
        return made

    replay.Replay.of = staticmethod(of)  # type: ignore


def told(x: Any) -> Any:
    """A tensor as its address, dtype, shape and strides."""
    if isinstance(x, torch.Tensor):
        return [x.data_ptr(), str(x.dtype), list(x.shape), list(x.stride())]
    return [told(part) for part in x] if isinstance(x, (tuple, list)) else str(x)


def layer(backend: str, activations: str, tokens: int = 40) -> Callable[[int], Callable[[], Any]]:
    """A layer with biases, in calls of other tensors each."""
    format = "nvfp4" if activations == "nvfp4" else "mxfp4"

    def of(seed: int) -> Callable[[], Any]:
        moe = random_layer(format, activations, E=6, H=128, I=128, seed=seed)
        prepared = cutemoe.prepare_moe(
            moe.w13, moe.w2, moe.b13, moe.b2, activations=activations, input_scale=moe.input_scale,
            backend=backend,
        )  # fmt: skip
        x, logits = draw.normal((tokens, 128), seed, moe.dtype), draw.normal((tokens, 6), seed)
        ids = logits.topk(2).indices.int()
        more = {"out": torch.empty_like(x), "backend": backend}
        more["workspace"] = cutemoe.Workspace.for_moe(prepared, tokens, 2)
        weights = torch.rand(tokens, 2)
        return lambda: cutemoe.fused_moe(x, prepared, ids, weights, **more)

    return of


def eager(seed: int) -> Callable[[], Any]:
    """A dense layer that rounds as torch's operators do, as transformers calls it."""
    moe = random_layer("bf16", "bf16", E=6, H=128, I=128, seed=seed).prepared()
    x, logits = draw.normal((40, 128), seed, torch.bfloat16), draw.normal((40, 6), seed)
    ids, weights, out = logits.topk(2).indices, torch.rand(40, 2).bfloat16(), torch.empty_like(x)
    more = {"workspace": cutemoe.Workspace.for_moe(moe, 40, 2), "backend": "triton"}
    return lambda: cutemoe.fused_moe(x, moe, ids, weights, rounding="eager", out=out, **more)


def groups(backend: str) -> Callable[[int], Callable[[], Any]]:
    """A grouped GEMM."""

    def of(seed: int) -> Callable[[], Any]:
        w = cutemoe.quantize(draw.normal((3, 64, 128), seed), "mxfp4")
        packed = cutemoe.prepare_grouped_gemm(w, backend=backend)
        x, out = draw.normal((9, 128), seed, torch.bfloat16), torch.empty(9, 64).bfloat16()
        offsets = torch.tensor([0, 2, 2, 8], dtype=torch.int32)
        return lambda: cutemoe.grouped_gemm(x, packed, offsets, out=out, backend=backend)

    return of


def heads(more: str) -> Callable[[int], Callable[[], Any]]:
    """A gated delta net on the Triton back end."""

    def of(seed: int) -> Callable[[], Any]:
        case = Case(B=3, T=2, seed=seed, index=torch.int32)
        call, function = case.call(), cutemoe.gdn_decode
        call |= {"out": torch.empty_like(call["v"]), "backend": "triton"}
        if more == "eager":
            shape = (1, 2, 128, 128)
            case = Case(B=3, T=1, shape=shape, dtype=torch.bfloat16, layout="kv", raw=False,
                        seed=seed, index=torch.int32)  # fmt: skip
            call = case.call()
            call |= {"out": torch.empty_like(call["v"]), "rounding": "eager", "backend": "triton"}
        elif more == "verify":
            function = cutemoe.gdn_verify
            call |= {"draft": case.draft(4, "cpu"), "num_accepted": torch.zeros(3).int()}
        elif more == "snapshots":
            call["intermediate_states"] = case.snapshots()
        elif more == "the same tensor twice":
            call["k"] = call["q"]
        return lambda: function(**call)

    return of


CASES: dict[str, Callable[[int], Callable[[], Any]]] = {
    **{f"layer {b} {a}": layer(b, a) for b in ("cute", "triton") for a in ("bf16", "fp16", "fp8")},
    "layer triton nvfp4": layer("triton", "nvfp4"),
    "layer of many rows": layer("triton", "bf16", 1200),
    "layer eager": eager,
    "groups cute": groups("cute"),
    "groups triton": groups("triton"),
    **{
        f"heads {m}": heads(m)
        for m in ("", "snapshots", "verify", "eager", "the same tensor twice")
    },
}


def launched(call: Callable[[], Any]) -> list[Any]:
    SEEN.clear()
    call()
    return [list(x) for x in SEEN]


def seen(of: Callable[[int], Callable[[], Any]]) -> list[Any]:
    first, second = of(1), of(2)
    REPLAYS.clear()
    before, recalled = launched(first), launched(second)
    for memory in (moe_api._KNOWN, gemm_api._KNOWN, gdn_api._DECODED, gdn_api._VERIFIED):
        memory.forget()
    made = list(REPLAYS)
    return [made, before, recalled, launched(second)]


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    on_a_card_that_notes()
    has_cute = importlib.util.find_spec("cutlass") is not None
    with torch.no_grad():
        found = {n: seen(of) for n, of in CASES.items() if has_cute or "cute" not in n}
    print(json.dumps(found), file=answers)


if __name__ == "__main__":
    main()
