"""Two cards in one process: a call runs where its tensors are, whichever device is current."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cutemoe
from tests import strategies as draw
from tests.gdn.cases import NATIVE, Case
from tests.moe.cases import random_layer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


def run_moe(device: torch.device, backend: str, activations: str) -> torch.Tensor:
    layer = random_layer(
        "nvfp4" if activations == "nvfp4" else "mxfp4", activations, E=6, H=320, I=96
    )
    moe = cutemoe.prepare_moe(
        layer.w13, layer.w2, activations=activations, input_scale=layer.input_scale,
        device=device, backend=backend,
    )  # fmt: skip
    x = draw.normal((37, 320), 1, layer.dtype).to(device)
    ids, weights = cutemoe.route(draw.normal((37, 6), 2).to(device), 3)
    return cutemoe.fused_moe(x, moe, ids, weights)


def run_gemm(device: torch.device, backend: str) -> torch.Tensor:
    w = cutemoe.quantize(draw.normal((3, 80, 160), 3), "mxfp4").to(device)
    w = cutemoe.prepare_grouped_gemm(w, backend=backend)
    offsets = torch.tensor([0, 0, 1, 70], dtype=torch.int32, device=device)
    return cutemoe.grouped_gemm(draw.normal((72, 160), 4, torch.bfloat16).to(device), w, offsets)


def run_gdn(device: torch.device, backend: str) -> torch.Tensor:
    call: dict[str, Any] = {
        k: v.to(device) if isinstance(v, torch.Tensor) else v
        for k, v in Case(3, 3, NATIVE[1], torch.bfloat16).call().items()
    }
    out = cutemoe.gdn_decode(**call, backend=backend)
    assert call["state"].device == device
    return torch.cat([out.flatten().float(), call["state"].flatten().float()])


CALLS = {
    **{f"gdn-{name}": (run_gdn, name) for name in ("cute", "triton")},
    **{f"gemm-{name}": (run_gemm, name) for name in ("cute", "triton")},
    **{f"moe-{name}": (run_moe, name, "bf16") for name in ("cute", "triton")},
    **{f"moe-{name}-fp4": (run_moe, name, "nvfp4") for name in ("cute_nvfp4", "triton")},
}


@pytest.mark.parametrize("current", [FIRST, SECOND], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_runs_on_the_device_of_its_tensors(call: str, current: torch.device) -> None:
    function, *arguments = CALLS[call]
    with torch.cuda.device(current):
        first = function(FIRST, *arguments)
        second = function(SECOND, *arguments)
        stream = torch.cuda.Stream(SECOND)
        stream.wait_stream(torch.cuda.current_stream(SECOND))
        with torch.cuda.stream(stream):
            apart = function(SECOND, *arguments)
        stream.synchronize()
        assert torch.cuda.current_device() == current.index
    assert first.device == FIRST and second.device == apart.device == SECOND
    assert torch.equal(first, second.to(FIRST)) and torch.equal(first, apart.to(FIRST))
