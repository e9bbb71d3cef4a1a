"""Cross-compiles gated delta net calls exactly as their launches would; answers in JSON.

    python gdn_worker.py <arch>          compiles every call of CALLS for sm_<arch>

The launch functions run with CPU tensors and a driver that knows a target but no device; a stand-in
for the kernel compiles what it is launched with.
"""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import torch

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# HQ, HV, DK, DV, dtype, state, layout, raw gates, l2norm, B, T, snapshots or "slots", update
DECODE = {
    "snapshots": (16, 32, 128, 128, BF16, F32, "vk", True, True, 4, 4, True, False),
    "slots": (16, 32, 128, 128, BF16, F32, "vk", True, True, 4, 4, "slots", False),
    "update": (16, 32, 128, 128, BF16, F32, "vk", True, True, 64, 1, False, True),
    "bf16 state": (16, 32, 128, 128, BF16, BF16, "vk", True, True, 64, 8, False, True),
    "kv": (16, 32, 128, 128, BF16, F32, "kv", True, True, 64, 4, False, True),
    "given gates": (4, 8, 64, 64, F16, F16, "vk", False, False, 2, 4, True, True),
    "float32": (2, 6, 256, 128, F32, F32, "vk", True, True, 64, 4, False, True),
    "odd sizes": (1, 3, 100, 36, BF16, F32, "vk", True, True, 2, 4, True, True),
    "wide": (1, 1, 512, 64, BF16, F32, "vk", True, True, 2, 4, True, True),
    "eager": (32, 32, 128, 128, BF16, F32, "kv", False, True, 4, 1, False, True),
}
# ... B, T, dtype of the recorded keys
VERIFY = {
    "few": (16, 32, 128, 128, BF16, F32, "vk", True, True, 4, 4, BF16),
    "many": (16, 32, 128, 128, BF16, F32, "vk", True, True, 64, 4, F32),
    "bf16 state": (16, 32, 128, 128, BF16, BF16, "vk", True, True, 64, 8, BF16),
    "kv": (16, 32, 128, 128, BF16, F32, "kv", True, True, 64, 4, BF16),
    "flush": (16, 32, 128, 128, BF16, F32, "vk", False, True, 64, 0, BF16),
    "odd sizes": (1, 3, 100, 36, BF16, F32, "vk", True, False, 2, 4, F32),
}


class Driver:
    """The target of a machine that is not there."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiles:
    """Stands in for a kernel: launching it compiles it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.result = kernel, None

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.result = self.kernel.function.warmup(*args, grid=grid, **kwargs)

        return launch


def tensors(HQ, HV, DK, DV, dtype, state, layout, raw, B, T) -> tuple:
    """q, k, v, gates, state, state_indices, out."""
    q, v = torch.zeros(B, T, HQ, DK, dtype=dtype), torch.zeros(B, T, HV, DV, dtype=dtype)
    a, h = torch.zeros(B, T, HV, dtype=dtype), torch.zeros(HV)
    gates = [a, a, h, h] if raw else [a.float(), a]
    rows = (DV, DK) if layout == "vk" else (DK, DV)
    pool = torch.zeros(B, HV, *rows, dtype=state)
    return q, q, v, gates, pool, torch.zeros(B, dtype=torch.int32), v.clone()


def compile_call(op: str, name: str, device: Any) -> dict[str, Any]:
    from cutemoe.gdn.draft import GDNDraft
    from cutemoe.gdn.plan import configure
    from cutemoe.gdn.problem import Problem
    from cutemoe.gdn.tensors import DraftTensors, GDNTensors
    from cutemoe.triton_kernels import gdn, gdn_eager, gdn_verify
    from tests.compile.worker import _read

    c: tuple[Any, ...] = (DECODE if op == "decode" else VERIFY)[name]
    HQ, HV, DK, DV, dtype, state, layout, raw, l2norm, B, T = c[:11]
    q, k, v, gates, pool, index, out = tensors(HQ, HV, DK, DV, dtype, state, layout, raw, B, T)
    if op == "decode":
        snap = pool.new_zeros(B, T, *pool.shape[1:]) if c[11] is True else None
        to = index.new_zeros(B, T) if c[11] == "slots" else None
        rounding = "eager" if name == "eager" else "fused"
        problem = Problem.of_decode(
            q, k, v, gates, pool, index, snap, out, l2norm, c[12], layout, to, rounding
        )
        x = GDNTensors(q, k, v, tuple(gates), pool, out, 0.1, index, snap, intermediate_indices=to)
        module, kernel = gdn, "gdn_decode_kernel"
        if rounding == "eager":
            module, kernel = gdn_eager, "gdn_eager_kernel"
    else:
        draft = GDNDraft.allocate(
            B, max(T, 1), HQ, HV, DK, head_dim_v=DV, dtype=c[11], device="cpu"
        )
        parts = draft.tensors
        problem = Problem.of_verify(q, k, v, gates, pool, parts, index, index, out, l2norm, layout)
        x = GDNTensors(
            q, k, v, tuple(gates), pool, out, 0.1, index,
            draft=DraftTensors(*parts), num_accepted=index,
        )  # fmt: skip
        module, kernel = gdn_verify, "gdn_verify_kernel"
    stand_in = Compiles(getattr(module, kernel))
    setattr(module, kernel, stand_in)
    try:
        (gdn_verify if op == "verify" else gdn).run(problem, configure(problem, device), x)
    finally:
        setattr(module, kernel, stand_in.kernel)
    assert stand_in.result is not None
    asm = stand_in.result.asm
    registers, local, sass = _read(asm["cubin"])
    return {
        "compiled": {
            "registers": registers,
            "local_bytes": local,
            "shared": stand_in.result.metadata.shared,
            "sass": sass,
        },
        "sums": sums(asm["ttgir"]),
    }


def sums(ttgir: str) -> list[str]:
    """The distinct spreads over threads of the sums over rows of a state."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.\w+<\{(.*?), warpsPerCTA", ttgir, re.MULTILINE))
    operands = re.findall(r'"tt\.reduce".*?\}\) : \(tensor<(\w+)xf32, .*?(#\w+)', ttgir, re.DOTALL)
    return sorted({layouts[name] for shape, name in operands if "x" in shape})


def main(arch: int) -> None:
    sys.path.pop(0)
    tests = sys.modules["tests"] = types.ModuleType("tests")
    tests.__path__ = [str(Path(__file__).parents[1])]
    from triton.runtime import driver

    from cutemoe.runtime.device import Device

    driver.set_active(Driver(arch))  # pyright: ignore[reportArgumentType]
    device = Device("cuda", arch=arch, sm_count=132, has_triton=True)
    for op, calls in (("decode", DECODE), ("verify", VERIFY)):
        for name in calls:
            print(json.dumps([op, name, compile_call(op, name, device)]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
