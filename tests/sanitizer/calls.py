"""A few small calls of every op on every GPU back end, for compute-sanitizer to watch.

Tails, skipped ids, empty experts, padding rows and both sorting kernels are in them. Torch's
allocator must not hide a stray access: run with PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[0] = str(ROOT)
sys.modules["tests"] = types.ModuleType("tests")
sys.modules["tests"].__path__ = [str(Path(__file__).parents[1])]

import cutemoe
from cutemoe.moe import workspace
from tests import strategies as draw
from tests.gdn.cases import NATIVE, Case
from tests.moe.cases import FP4, random_layer

CUDA = torch.device("cuda")
# weights, activations, intermediate
LAYERS = (
    ("mxfp4", "bf16", 192),
    ("mxfp4", "fp16", 96),
    ("nvfp4", "bf16", 96),
    ("nvfp4", "nvfp4", 96),
    ("mxfp4", "mxfp4", 96),
    ("int4", "bf16", 192),
    ("int4", "fp8", 96),
    ("mxfp4", "fp8", 96),
    ("bf16", "bf16", 96),
)


ONLY: list[str] = []


def names(op: str) -> list[str]:
    """Back ends that run here, without the reference, or those of the command line."""
    here = [r.name for r in cutemoe.backends(op) if r.reason is None and r.name != "reference"]
    return [name for name in here if not ONLY or name in ONLY]


def moe() -> Iterator[str]:
    """Layers with widths that no tile divides, or units of 64, few and many tokens; y of codes in
    parts."""
    workspace.WHOLE_Y = 0
    here = names("fused_moe")
    if "cute_nvfp4" in here:
        here += ["cute_nvfp4_static", "cute_nvfp4_dynamic"]
    for backend in here:
        for format, activations, inner in LAYERS:
            if backend.startswith("cute_nvfp4_") and format not in FP4:
                continue
            layer = random_layer(format, activations, E=6, H=320, I=inner, gate_up="interleaved")
            prepared = cutemoe.prepare_moe(
                layer.w13, layer.w2, layer.b13, layer.b2, activations=activations,
                gate_up="interleaved", input_scale=layer.input_scale, device=CUDA, backend=backend,
            )  # fmt: skip
            for tokens in (1, 20, 37, 700):
                x = draw.normal((tokens, 320), 1, layer.dtype).to(CUDA)
                logits = draw.normal((tokens, 6), 2).to(CUDA)
                ids, weights = cutemoe.route(logits, 3)
                ids[tokens // 2, 0] = -1
                try:
                    y = cutemoe.fused_moe(x, prepared, ids, weights, expert_offset=1)
                except cutemoe.Unsupported as e:
                    yield f"fused_moe {backend} {format} x {activations}: {e}"
                    break
                assert torch.isfinite(y).all()
                yield f"fused_moe {backend} {format} x {activations} T={tokens}"


def gemm() -> Iterator[str]:
    """Groups of no, one and many rows."""
    offsets = torch.tensor([0, 0, 1, 70], dtype=torch.int32, device=CUDA)
    for backend in names("grouped_gemm"):
        for format in ("mxfp4", "nvfp4", "int4"):
            w = cutemoe.quantize(draw.normal((3, 80, 160), 3), format, group_size=None
                                 if format != "int4" else 32).to(CUDA)  # fmt: skip
            w = cutemoe.prepare_grouped_gemm(w, backend=backend)
            x = draw.normal((72, 160), 4, torch.bfloat16).to(CUDA)
            try:
                out = cutemoe.grouped_gemm(x, w, offsets)
            except cutemoe.Unsupported as e:
                yield f"grouped_gemm {backend} {format}: {e}"
                continue
            assert torch.isfinite(out).all() and not out[70:].any()
            yield f"grouped_gemm {backend} {format}"


def on_card(case: Case) -> dict[str, Any]:
    """The tensors of a call, row 1 of them padding."""
    call = case.call()
    call["state_indices"][1] = -1
    return {k: v.to(CUDA) if isinstance(v, torch.Tensor) else v for k, v in call.items()}


def gdn() -> Iterator[str]:
    """Decoding with snapshots, of one token and of many with rows that no warp divides, and two
    windows of verification; one row is padding."""
    for backend in names("gdn_decode"):
        for layout in ("vk", "kv"):
            for state in (torch.float32, torch.bfloat16):
                case = Case(3, 3, NATIVE[1], torch.bfloat16, state, layout)
                call = on_card(case)
                snapshots = case.snapshots().to(CUDA)
                cutemoe.gdn_decode(**call, intermediate_states=snapshots, backend=backend)
                for few in (Case(3, 1, NATIVE[1]), Case(3, 9, (1, 2, 64, 20))):
                    few = replace(few, state=state, layout=layout, dtype=torch.bfloat16)
                    steps = few.snapshots().to(CUDA) if few.T > 1 else None
                    cutemoe.gdn_decode(**on_card(few), intermediate_states=steps, backend=backend)
                draft = case.draft(4, "cuda")
                accepted = torch.tensor([2, 0, 9], dtype=torch.int32, device=CUDA)
                for _ in range(2):
                    cutemoe.gdn_verify(**call, draft=draft, num_accepted=accepted, backend=backend)
                draft.flush(call["state"], accepted, call["state_indices"], layout, backend=backend)
                yield f"gdn {backend} {layout} {state}"


GROUPS = {"moe": moe, "gemm": gemm, "gdn": gdn}


def main() -> None:
    """Runs the groups named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="+", choices=GROUPS)
    parser.add_argument("--backends", nargs="+", default=[], help="default: all that run here")
    args = parser.parse_args()
    ONLY.extend(args.backends)
    for group in args.groups:
        for line in GROUPS[group]():
            torch.cuda.synchronize()
            print(line, flush=True)


if __name__ == "__main__":
    main()
