"""rounding="eager": the bits of torch's operators in the loop that transformers has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cutemoe
from cutemoe.gdn import plan
from cutemoe.gdn.problem import Problem
from cutemoe.runtime.device import Device
from tests.close import assert_same, assert_within
from tests.gdn.cases import NATIVE, Case, live_slots, oracle, torch_path, vk

H200 = Device("cuda", 0, "H200", 90, 132, 232448, True)
# what the kernel takes
CASE = Case(B=3, T=1, shape=(1, 2, 128, 128), dtype=torch.bfloat16, layout="kv", raw=False)
CASES = {
    "step": CASE,
    "heads": CASE.with_(shape=(2, 6, 128, 128), dtype=torch.float16, index=torch.int64),
    "window": CASE.with_(T=3, layout="vk", index=None, spare=0),
    "float32": CASE.with_(dtype=torch.float32, l2norm=False),
}
every_case = pytest.mark.parametrize("name", CASES)


def loop(call: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """out and the last states [B, HV, DK, DV] of the operators of transformers 5."""
    group = call["v"].shape[2] // call["q"].shape[2]
    q, k, v, beta, decay = (
        x.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        for x in (
            *(call[n].repeat_interleave(group, dim=2) for n in "qk"),
            call["v"], call["beta"], call["g"],
        )
    )  # fmt: skip
    if call["qk_l2norm"]:
        q, k = (x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q / (1 / call["scale"] if "scale" in call else q.shape[-1] ** 0.5)
    S = call["state"][live_slots(call)]
    S = S if call["state_layout"] == "kv" else S.transpose(-1, -2).contiguous()
    out = torch.zeros_like(v)
    for t in range(v.shape[2]):
        x_q, x_k = q[:, :, t], k[:, :, t]
        S = S * decay[:, :, t].exp()[..., None, None]
        delta = (v[:, :, t] - (S * x_k.unsqueeze(-1)).sum(dim=-2)) * beta[:, :, t].unsqueeze(-1)
        S = S + x_k.unsqueeze(-1) * delta.unsqueeze(-2)
        out[:, :, t] = (S * x_q.unsqueeze(-1)).sum(dim=-2)
    return out.transpose(1, 2).contiguous().to(call["v"].dtype), S


def assert_bits(call: dict[str, Any], backend: str) -> None:
    want, S = loop(call)
    got = cutemoe.gdn_decode(**call, rounding="eager", backend=backend)
    assert_same(got, want)
    states = call["state"][live_slots(call)]
    assert_same(states if call["state_layout"] == "kv" else states.transpose(-1, -2), S)


@every_case
def test_the_reference_is_torch_bit_for_bit(name):
    assert_bits(CASES[name].call(), "reference")
    small = CASES[name].with_(shape=(1, 3, 24, 8))
    assert_bits(small.call(), "reference")


@pytest.mark.gpu
@every_case
def test_the_kernel_is_torch_on_the_same_gpu_bit_for_bit(name):
    for B in (1, 3, 70):
        case = CASES[name].with_(B=B)
        call = {k: x.cuda() if isinstance(x, torch.Tensor) else x for k, x in case.call().items()}
        assert_bits(call, "triton")


@every_case
def test_errors_are_within_twice_those_of_torch(target, name):
    case = CASES[name]
    call = case.call()
    want, peer = oracle(call), torch_path(call, target.device)
    moved = target.put(call)
    out = target.decode(**moved, rounding="eager").cpu()
    assert_within(out, peer.out.to(case.dtype), want.out)
    states = vk(moved["state"].cpu()[live_slots(call)], case)
    assert_within(states, peer.states[:, -1], want.states[:, -1])


def test_padding_rows_and_states_that_are_kept(target):
    call = target.put(CASE.with_(B=4).call())
    call["state_indices"][1:3] = torch.tensor([-1, 99])
    before = call["state"].clone()
    out = target.decode(**call, rounding="eager", update_state=False)
    assert_same(call["state"], before)
    assert out[[0, 3]].any() and not out[[1, 2]].any()
    again = target.decode(**call, rounding="eager")
    assert_same(again, out)
    changed = (call["state"] != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == sorted(int(call["state_indices"][i]) for i in (0, 3))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"DK": 64}, "DK = DV = 128 with rounding 'eager', got 64 and 128"),
        ({"state": "bfloat16"}, "float32 states with rounding 'eager', got bfloat16"),
        ({"gates": "raw"}, "g and beta with rounding 'eager'"),
        ({"snapshots": True}, "no states after each token"),
        ({"scattered": True}, "no states after each token"),
    ],
)
def test_what_the_kernel_does_not_take_torch_computes(changed, words):
    fields: dict[str, Any] = {
        "B": 1, "T": 1, "HQ": 1, "HV": 1, "DK": 128, "DV": 128, "slots": 1, "dtype": "bfloat16",
        "state": "float32", "gates": "given", "layout": "kv", "indexed": False, "qk_l2norm": True,
    }  # fmt: skip
    good = Problem(**fields, rounding="eager")
    assert plan.refuse_triton(good, H200) is None
    assert words in (plan.refuse_triton(Problem(**fields | changed, rounding="eager"), H200) or "")
    assert "rounding 'fused', got 'eager'" in (plan.CUTE.refuse(good, H200) or "")


def test_the_words_of_the_argument():
    call = CASE.call()
    for bad in ("torch", None):
        with pytest.raises(cutemoe.InvalidCall, match="rounding: expected"):
            cutemoe.gdn_decode(**call, rounding=bad)  # type: ignore[arg-type]
    found = cutemoe.explain("gdn_decode", **call, rounding="eager")
    assert found.problem.rounding == "eager"
    assert NATIVE[0][2:] == (plan.EAGER_HEAD, plan.EAGER_HEAD)
