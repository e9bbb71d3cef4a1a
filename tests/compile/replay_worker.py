"""What recalled calls launch, beside what the same calls launch when they are checked.

The driver and the CuTe kernels only write down what they are given; tensors are on the CPU. Prints
for every case whether replays were made, and the launches of a first, recalled and checked call.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import struct
import sys
import types
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.pop(0)
tests = sys.modules["tests"] = types.ModuleType("tests")
tests.__path__ = [str(Path(__file__).parents[1])]

import cutemoe
from cutemoe.gdn import api as gdn_api
from cutemoe.gemm import api as gemm_api
from cutemoe.moe import api as moe_api
from cutemoe.runtime import capture, driver, recall, replay
from cutemoe.runtime.device import Device
from tests import strategies as draw
from tests.gdn.cases import Case
from tests.moe.cases import random_layer
from tests.runtime import fake_driver

H200 = Device("cuda", 0, "card", 90, 132, 232448, True)
SCRATCH = torch.zeros(4096, dtype=torch.uint8)
SEEN: list[Any] = []
REPLAYS: list[bool] = []
NAMES: list[str] = [""]


class Kernel:
    """A CuTe kernel: its parameters are what it was called with."""

    def __init__(self, config: Any) -> None:
        self.name = str(config)

    def __call__(self, *args: Any) -> None:
        note(self.name, [1] * 7, False, self.parameters(args)[0])

    def parameters(self, args: Any) -> tuple[bytes, tuple[tuple[int, tuple[torch.Tensor]], ...]]:
        """All of them, and where addresses are."""
        words: list[int] = []
        addresses = []

        def add(x: Any) -> None:
            if isinstance(x, torch.Tensor):
                addresses.append((8 * len(words), (x,)))
                kind = zlib.crc32(str(x.dtype).encode())
                words.extend([x.data_ptr(), kind, *x.shape, *x.stride()])
            elif isinstance(x, tuple):
                for part in x:
                    add(part)
            else:
                words.append(zlib.crc32(str(x).encode()))

        add(args)
        return struct.pack(f"{len(words)}Q", *words), tuple(addresses)


def note(function: str, sizes: Any, early: bool, parameters: bytes) -> None:
    SEEN.append([function, list(sizes), early, parameters.hex()])


def launch(function, grid, threads, shared, index, pack, values, pdl) -> None:
    """In place of `driver.launch`."""
    buffer = bytearray(4096)
    pack(memoryview(buffer), 0, *values)
    size = int.from_bytes(buffer[:8], sys.byteorder)
    sizes = (*(*grid, 1, 1)[:3], threads, 1, 1, shared)
    note(NAMES[function.value], sizes, pdl, bytes(buffer[8 : 8 + size]))


def launch_again(config: Any, function: Any, _: None, extra: Any) -> int:
    """In place of cuLaunchKernelEx."""
    x = fake_driver.launched(config, function, extra)
    note(NAMES[x.function], x.sizes, x.attributes == {fake_driver.PDL: 1}, x.parameters)
    return 0


def loaded(name: str) -> ctypes.c_void_p:
    """A function: the place of its name."""
    NAMES.append(name)
    return ctypes.c_void_p(len(NAMES) - 1)


def captured(kernel: Kernel, args: Any) -> driver.Launch:
    """In place of `capture.launch_of`."""
    return driver.Launch(loaded(kernel.name), (1,) * 7, *kernel.parameters(args))


def on_a_card_that_notes() -> None:
    """Calls on CPU tensors go all the way to the driver."""
    from cutemoe.gdn import cute_launch as gdn_launch
    from cutemoe.gemm import cute_launch as gemm_launch

    found: Any = types.SimpleNamespace(cuLaunchKernelEx=launch_again)
    put: Callable[..., None] = setattr
    put(Device, "of", staticmethod(lambda _: H200))
    put(recall, "DEVICES", ("cpu",))
    put(recall, "_current_device", lambda: None)
    put(recall, "CALLS", 1)
    put(torch._C, "_cuda_getDevice", lambda: 0)
    put(torch._C, "_cuda_getCurrentRawStream", lambda index: 5)
    put(driver, "load", lambda cubin, name, *_: loaded(name))
    put(driver, "launch", launch)
    put(driver, "library", lambda: found)
    put(capture, "launch_of", captured)
    put(gemm_launch, "kernel", Kernel)
    put(gdn_launch, "kernel", Kernel)
    real_of, real_empty = replay.Replay.of, torch.empty

    def of(*args: Any) -> Any:
        made = real_of(*args)
        REPLAYS.append(made is not None)
        return made

    def empty(*shape: Any, **kind: Any) -> torch.Tensor:
        # the list of tiles, which a call makes, is the same memory in all of them
        own = type(shape[0]) is int and shape[0] < 4096 and kind.get("dtype") is torch.uint8
        return SCRATCH[: shape[0]] if own else real_empty(*shape, **kind)

    put(replay.Replay, "of", staticmethod(of))
    put(torch, "empty", empty)


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


def heads(more: str, backend: str = "triton") -> Callable[[int], Callable[[], Any]]:
    """A gated delta net."""

    def of(seed: int) -> Callable[[], Any]:
        shape = (1, 2, 64, 64) if backend == "cute" else Case().shape
        case = Case(B=3, T=2, shape=shape, seed=seed, index=torch.int32)
        call, function = case.call(), cutemoe.gdn_decode
        call |= {"out": torch.empty_like(call["v"]), "backend": backend}
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
    **{f"heads cute {m}": heads(m, "cute") for m in ("", "snapshots", "verify")},
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
    for memory in (
        moe_api._KNOWN,
        moe_api._ROUTED,
        gemm_api._KNOWN,
        gdn_api._DECODED,
        gdn_api._VERIFIED,
    ):
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
