"""What launches do without a GPU, in a process where Triton compiles: one json answer on stdout.

python launch_worker.py specialise | pass | layer | heads | missing | stored
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import torch

FIRST, LAST = 1, 4096


def arguments() -> dict[str, tuple[Any, tuple, dict[str, Any]]]:
    """Launches by name: kernel, arguments, keywords; with every kind of argument there is."""
    from cutemoe.triton_kernels import combine, gdn, quantize, sort

    i32 = torch.zeros(4096, dtype=torch.int32)
    i64 = torch.zeros(64, 6, dtype=torch.int64)
    f32, bf16 = torch.zeros(4096), torch.zeros(64, 64, dtype=torch.bfloat16)
    few = {"TILE": 8, "BLOCK": 64, "BINS": 8, "PDL": True, "num_warps": 4, "num_stages": 1}
    few |= {"launch_pdl": True}
    combined = {"TOP_K": 2, "BLOCK": 64, "PARTS": 1, "PORTABLE": False, "num_warps": 4}
    rounded = {"FORMAT": "fp8", "DIVIDE": 0, "SORTED": False, "BINS": 2, "BLOCK": 64}
    view = gdn.view(bf16.view(4, 1, 16, 64))
    snaps = gdn.snapshots_of(bf16.view(4, 1, 16, 64), None)
    gate = gdn.Gate(f32[:16], 1, f32[:16], 1)
    pool = gdn.Pool(f32, 1, 4096, 64)
    sizes = {"SIZE": (64, 64), "TILE": (16, 2, 64, 4, False), "GROUP": 1, "L2NORM": True}
    sizes |= {"STATE": (64, 1), "SNAP": (64, 1), "UPDATE": True, "num_warps": 1}
    state = (view, view, view, view, view)
    return {
        "aligned": (sort.sort_slots, (i32, 16, i32, i32, i32, i32, 24, 6, 0, 8), few),
        "ones": (sort.sort_slots, (i32, 1, i32, i32, i32, i32, 1, 1, 1, 1), few),
        "unaligned": (sort.sort_slots, (i64, 6, i32[1:], i32[2:], i32, i32, 1, 6, 3, 8), few),
        "wide": (sort.sort_slots, (i64, 2**31, i32, i32, i32, i32, 2**35, 6, -1, 8), few),
        "floats": (combine.combine_slots, (f32, i32, f32, bf16, 64, 2, 2, 64, 0, 8), combined),
        "none": (quantize.quantize_rows, (bf16, bf16, f32, None, None, None, 64, 64, 1), rounded),
        "nested": (
            gdn.gdn_decode_kernel,
            (
                *state,
                gate,
                pool,
                gdn.Index(i32, 1),
                gdn.snapshots_of(None, None),
                view,
                1,
                1,
                0.125,
            ),
            sizes,
        ),
        "nested without": (
            gdn.gdn_decode_kernel,
            (*state, None, pool, gdn.Index(None, 0), snaps, view, 32, 16, 1.0),
            sizes,
        ),
    }


def specialise() -> dict[str, Any]:
    """Signature, constants and attributes, ours and Triton's own."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from cutemoe.triton_kernels import launch

    backend = make_backend(GPUTarget("cuda", 90, 32))
    answers = {}
    for name, (kernel, args, keywords) in arguments().items():
        function = kernel.function
        bind = create_function_from_signature(function.signature, function.params, backend)
        bound, specialization, options = bind(*args, **keywords)
        _, *theirs = function._pack_args(backend, dict(options), bound, specialization, options)
        call = launch.specialised(function, args, keywords)
        ours = [call.signature, call.constants, call.attributes]
        answers[name] = [[shown(x) for x in ours], [shown(x) for x in theirs]]
    return answers


def shown(found: dict[Any, Any]) -> list[str]:
    # the constant of an integer that is 1 is the integer, or Triton's word for it
    return sorted(f"{k}: {v}" for k, v in found.items() if v)


def passed() -> dict[str, Any]:
    """The bytes that reach the driver for each launch, and what they should say."""
    import struct

    from cutemoe.runtime import driver
    from cutemoe.runtime.device import Device
    from cutemoe.triton_kernels import launch

    torch._C._cuda_getDevice = lambda: 0
    Device.of = staticmethod(lambda _: Device("cuda", 0, "card", 90, 132, 232448, True))  # type: ignore
    driver.load = lambda *_: "function"  # type: ignore
    seen: list[Any] = []

    def fake(function, grid, threads, shared, index, pack, values, pdl):
        buffer = bytearray(4096)
        pack(buffer, 0, *values)
        seen.append((grid, threads, index, pdl, values[0], bytes(buffer[8 : 8 + values[0]])))

    driver.launch = fake  # type: ignore
    answers = {}
    for name, (kernel, args, keywords) in arguments().items():
        for _ in range(2):
            kernel[(7, 2)](*args, **keywords)
        call = launch.specialised(kernel.function, args, keywords)
        flat = list(zip(leaves(tuple(call.signature.values())), leaves(args), strict=False))
        values = [
            v.data_ptr() if isinstance(v, torch.Tensor) else v for t, v in flat if t != "constexpr"
        ]
        letters = ["P" if t[0] == "*" else launch._LETTERS[t] for t, _ in flat if t != "constexpr"]
        wanted = struct.pack("@" + "".join(letters) + "0P", *values)
        first, second = seen[-2:]
        grid, threads, index, pdl, size, got = second
        rest = got[len(wanted) :]
        right = got[: len(wanted)] == wanted and not any(rest) and len(rest) in (0, 8, 16)
        same = first == second and size == len(got) and pdl == keywords.get("launch_pdl", False)
        answers[name] = [grid, threads, index, right, same, len(rest)]
    return answers


def leaves(values: tuple) -> list[Any]:
    found: list[Any] = []
    for x in values:
        found += leaves(x) if isinstance(x, tuple) else [x]
    return found


def prepared(kind: str) -> dict[str, Any]:
    """Compiles a small model as a preset would, then calls it with every batch there is."""
    from cutemoe.commands import prepare
    from cutemoe.runtime import compile as compiling
    from cutemoe.runtime.device import compile_only
    from cutemoe.runtime.preset import Heads, Layer

    layer, heads = Layer(256, 256, 8, 2), Heads(2, 4, 64)

    def make(sizes: list[int]) -> None:
        calls = prepare.layer_calls(layer, "mxfp4", None, "bf16", sizes)
        if kind == "heads":
            calls = prepare.gdn_calls(heads, torch.float32, sizes)
        for call in calls:
            call()

    with compile_only("sm_90a"), torch.no_grad():
        make(prepare.batches())
        built = compiling.build_count() + compiling.load_count()
        with compiling.no_jit():
            make(list(range(FIRST, LAST + 1)))
        again = compiling.build_count() + compiling.load_count() - built
    return {"kernels": built, "more": again}


def missing() -> dict[str, Any]:
    """What a call says that finds no kernel and may not compile one."""
    from cutemoe.commands import prepare
    from cutemoe.runtime.compile import NotCompiled, no_jit
    from cutemoe.runtime.device import compile_only
    from cutemoe.runtime.preset import PRESETS

    layer = PRESETS["gpt-oss-20b"].layer
    assert layer is not None
    said = []
    with compile_only("sm_90a"), torch.no_grad(), no_jit():
        for call in prepare.layer_calls(layer, "mxfp4", None, "bf16", [4]):
            try:
                call()
            except NotCompiled as e:
                said.append(str(e))
    return {"said": said}


def stored() -> dict[str, Any]:
    """A CuTe kernel from memory, just stored, and loaded: what each says to the same arguments."""
    from cutemoe.gdn.cute_build import build
    from cutemoe.gdn.cute_plan import Config
    from cutemoe.runtime import compile as compiling
    from cutemoe.runtime.device import Device

    bf16 = torch.bfloat16
    q, v = torch.zeros(2, 2, 1, 128, dtype=bf16), torch.zeros(2, 2, 2, 128, dtype=bf16)
    a, h, state = torch.zeros(2, 2, 2, dtype=bf16), torch.zeros(2), torch.zeros(2, 2, 128, 128)
    index = torch.zeros(2, dtype=torch.int32)
    good: list[Any] = [(q, q, v, v), (a, a, h, h), state, index, None, None, None, 1.0, 2, 32768]
    wrong = {0: (q, q, v), 1: (h, a, h, h), 2: index, 7: "one", 8: None}
    calls = [good, *([*good[:i], bad, *good[i + 1 :]] for i, bad in wrong.items())]
    card = Device("cuda", 0, "card", 90, 132, 232448, True)
    config = Config()
    kernels = [build(config), *(compiling._persistent(build, config, card) for _ in range(2))]
    said = []
    for kernel in kernels:
        said.append([])
        for call in calls:
            try:
                kernel(*call)
                said[-1].append("ran")
            except Exception as e:
                said[-1].append(f"{type(e).__name__}: {e}")
    return {"said": said, "built": compiling.build_count(), "loaded": compiling.load_seconds()}


def main(what: str) -> None:
    sys.path.pop(0)
    tests = sys.modules["tests"] = types.ModuleType("tests")
    tests.__path__ = [str(Path(__file__).parents[1])]
    answers, sys.stdout = sys.stdout, sys.stderr
    work = {"specialise": specialise, "pass": passed, "missing": missing, "stored": stored}
    found = work[what]() if what in work else prepared(what)
    print(json.dumps(found), file=answers)


if __name__ == "__main__":
    main(sys.argv[1])
