"""Every public argument: malformed, it is named, and no byte is written."""

from typing import Any

import pytest
import torch

import cutemoe
from tests.gdn.cases import Case
from tests.poison import Poison, kept

CASE = Case(B=2, T=2, shape=(2, 4, 16, 8))
CALL = CASE.call()
GIVEN: dict[str, Any] = {"a": None, "b": None, "A_log": None, "dt_bias": None}
GIVEN |= {"g": torch.zeros(2, 2, 4), "beta": torch.zeros(2, 2, 4)}
Q, V, STATE = CALL["q"], CALL["v"], CALL["state"]
meta = torch.device("meta")


def every_second(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def change(**kwargs: Any) -> dict[str, Any]:
    return kwargs


BAD = {
    "q type": ("q", change(q=[1.0])),
    "q dtype": ("q", change(q=Q.double())),
    "q rank": ("q", change(q=Q[0])),
    "q stride": ("q", change(q=every_second(Q))),
    "q heads": ("q", change(q=Q[:, :, :0], k=Q[:, :, :0])),
    "q head size": ("q", change(q=Q[..., :0], k=Q[..., :0])),
    "q grad": ("q", change(q=Q.clone().requires_grad_())),
    "k type": ("k", change(k=None)),
    "k dtype": ("k", change(k=Q.bfloat16())),
    "k shape": ("k", change(k=Q[..., :8])),
    "k stride": ("k", change(k=every_second(Q))),
    "k device": ("k", change(k=Q.to(meta))),
    "v dtype": ("v", change(v=V.half())),
    "v rank": ("v", change(v=V[0])),
    "v tokens": ("v", change(v=V[:, :1])),
    "v heads": ("v", change(v=V[:, :, :3])),
    "v no heads": ("v", change(v=V[:, :, :0])),
    "v stride": ("v", change(v=every_second(V))),
    "v device": ("v", change(v=V.to(meta))),
    "state type": ("state", change(state=None)),
    "state dtype": ("state", change(state=STATE.double())),
    "state rank": ("state", change(state=STATE[0])),
    "state layout": ("state", change(state=STATE.transpose(2, 3).contiguous())),
    "state heads": ("state", change(state=STATE[:, :3])),
    "state stride": ("state", change(state=STATE.transpose(2, 3).contiguous().transpose(2, 3))),
    "state overlapping": ("state", change(state=STATE[:1].expand(4, -1, -1, -1))),
    "state too small": ("state", change(state=STATE[:1], state_indices=None)),
    "state device": ("state", change(state=STATE.to(meta))),
    "state grad": ("state", change(state=STATE.clone().requires_grad_())),
    "a type": ("a", change(a=1.0)),
    "a shape": ("a", change(a=CALL["a"][:, :, :3])),
    "a dtype": ("a", change(a=CALL["a"].int())),
    "a device": ("a", change(a=CALL["a"].to(meta))),
    "a missing": ("a", change(a=None)),
    "b shape": ("b", change(b=CALL["b"][:1])),
    "b missing": ("b", change(b=None)),
    "A_log shape": ("A_log", change(A_log=torch.zeros(2))),
    "A_log dtype": ("A_log", change(A_log=torch.zeros(4, dtype=torch.int32))),
    "A_log missing": ("A_log", change(A_log=None)),
    "dt_bias shape": ("dt_bias", change(dt_bias=torch.zeros(1, 4))),
    "dt_bias missing": ("dt_bias", change(dt_bias=None)),
    "both gates": ("g, beta", change(beta=torch.zeros(2, 2, 4))),
    "g dtype": ("g", GIVEN | change(g=torch.zeros(2, 2, 4).bfloat16())),
    "g shape": ("g", GIVEN | change(g=torch.zeros(2, 2, 2))),
    "g missing": ("g", GIVEN | change(g=None)),
    "beta dtype": ("beta", GIVEN | change(beta=torch.zeros(2, 2, 4).double())),
    "beta missing": ("beta", GIVEN | change(beta=None)),
    "no gates": ("a", GIVEN | change(g=None, beta=None)),
    "state_indices type": ("state_indices", change(state_indices=[0, 1])),
    "state_indices dtype": ("state_indices", change(state_indices=torch.zeros(2))),
    "state_indices short": ("state_indices", change(state_indices=torch.zeros(1).int())),
    "state_indices device": ("state_indices", change(state_indices=torch.zeros(2).int().to(meta))),
    "scale type": ("scale", change(scale="1")),
    "scale bool": ("scale", change(scale=True)),
    "qk_l2norm type": ("qk_l2norm", change(qk_l2norm=1)),
    "state_layout name": ("state_layout", change(state_layout="kd")),
    "state_layout type": ("state_layout", change(state_layout=None)),
    "out type": ("out", change(out=[])),
    "out dtype": ("out", change(out=V.half())),
    "out shape": ("out", change(out=V[:1])),
    "out stride": ("out", change(out=every_second(V))),
    "out overlapping": ("out", change(out=V[:1].expand(2, -1, -1, -1))),
    "out device": ("out", change(out=V.to(meta))),
    "backend name": ("backend", change(backend="cuda")),
    "backend type": ("backend", change(backend=None)),
}
SNAPSHOTS = torch.zeros(2, 2, *STATE.shape[1:])
BAD_DECODE = {
    "update_state type": ("update_state", change(update_state=None)),
    "intermediate type": ("intermediate_states", change(intermediate_states=1)),
    "intermediate dtype": ("intermediate_states", change(intermediate_states=SNAPSHOTS.half())),
    "intermediate rank": ("intermediate_states", change(intermediate_states=SNAPSHOTS[0])),
    "intermediate few": ("intermediate_states", change(intermediate_states=SNAPSHOTS[:, :1])),
    "intermediate rows": ("intermediate_states", change(intermediate_states=SNAPSHOTS[:1])),
    "intermediate heads": ("intermediate_states", change(intermediate_states=SNAPSHOTS[:, :, :1])),
    "intermediate stride": (
        "intermediate_states",
        change(intermediate_states=every_second(SNAPSHOTS)),
    ),
    "intermediate overlapping": (
        "intermediate_states",
        change(intermediate_states=SNAPSHOTS[:, :1].expand(-1, 2, -1, -1, -1)),
    ),
    "intermediate device": ("intermediate_states", change(intermediate_states=SNAPSHOTS.to(meta))),
}
DRAFT = CASE.draft(2, "cpu")


def draft(**parts: torch.Tensor) -> dict[str, Any]:
    names = ("u", "k", "k_rnorm", "log_g", "mark")
    whole = dict(zip(names, DRAFT.tensors, strict=True))
    return {"draft": cutemoe.GDNDraft(**{**whole, **parts})}


BAD_VERIFY = {
    "draft type": ("draft", change(draft=DRAFT.tensors)),
    "draft short": ("draft", change(draft=CASE.draft(1, "cpu"))),
    "draft slots": (r"draft\.u", change(draft=CASE.with_(spare=3).draft(2, "cpu"))),
    "draft heads": (r"draft\.k", change(draft=CASE.with_(shape=(1, 4, 16, 8)).draft(2, "cpu"))),
    "draft device": (r"draft\.u", change(draft=CASE.draft(2, "meta"))),
    "draft key dtype": (r"draft\.k", change(draft=CASE.draft(2, "cpu", torch.bfloat16))),
    "draft u rank": (r"draft\.u", draft(u=DRAFT.u[0])),
    "draft u dtype": (r"draft\.u", draft(u=DRAFT.u.half())),
    "draft rnorm": (r"draft\.k_rnorm", draft(k_rnorm=DRAFT.k_rnorm[:, :1])),
    "draft log_g": (r"draft\.log_g", draft(log_g=DRAFT.log_g.double())),
    "draft mark": (r"draft\.mark", draft(mark=DRAFT.mark.int())),
    "draft stride": (r"draft\.mark", draft(mark=DRAFT.mark.mT.contiguous().mT)),
    "num_accepted type": ("num_accepted", change(num_accepted=[0, 0])),
    "num_accepted dtype": ("num_accepted", change(num_accepted=torch.zeros(2))),
    "num_accepted shape": ("num_accepted", change(num_accepted=torch.zeros(3).int())),
    "num_accepted device": ("num_accepted", change(num_accepted=torch.zeros(2).int().to(meta))),
    "fold": ("fold", change(fold="never")),
}


def refused(function: Any, name: str, changed: dict[str, Any], **extra: Any) -> None:
    with Poison() as poison:
        good = CALL | {"out": poison.empty(V.shape, V.dtype), "state": poison.of(STATE)} | extra
        bad = {**good, **changed}
        written = {"out": good["out"], "state": good["state"]}
        written |= {n: x for n, x in extra.items() if isinstance(x, torch.Tensor)}
        with kept(**written):
            with pytest.raises(cutemoe.InvalidCall, match=rf"^{name}: "):
                function(**bad)
            if name != "backend":
                with pytest.raises(cutemoe.InvalidCall, match=rf"^{name}: "):
                    cutemoe.explain(function, **bad)


@pytest.mark.parametrize("case", [*BAD, *BAD_DECODE])
def test_decode_names_the_bad_argument(case):
    name, changed = {**BAD, **BAD_DECODE}[case]
    refused(cutemoe.gdn_decode, name, changed, intermediate_states=torch.zeros_like(SNAPSHOTS))


@pytest.mark.parametrize("case", [*BAD, *BAD_VERIFY])
def test_verify_names_the_bad_argument(case):
    name, changed = {**BAD, **BAD_VERIFY}[case]
    records = dict(zip(("u", "k", "k_rnorm", "log_g", "mark"), DRAFT.tensors, strict=True))
    with kept(**records):
        accepted = torch.zeros(2, dtype=torch.int32)
        refused(cutemoe.gdn_verify, name, changed, draft=DRAFT, num_accepted=accepted)


def test_the_good_calls_are_good():
    cutemoe.gdn_decode(**CALL | {"state": STATE.clone()}, intermediate_states=SNAPSHOTS.clone())
    cutemoe.gdn_decode(**CALL | GIVEN | {"state": STATE.clone()})
    accepted = torch.zeros(2, dtype=torch.int32)
    cutemoe.gdn_verify(**CALL, draft=CASE.draft(2, "cpu"), num_accepted=accepted)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("state", change(state=None)),
        ("state", change(state=STATE[:2])),
        ("num_accepted", change(num_accepted=3)),
        ("num_accepted", change(num_accepted=torch.zeros(2))),
        ("num_accepted", change(num_accepted=torch.zeros(2, 1).int())),
        ("state_indices", change(state_indices=[0])),
        ("state_indices", change(state_indices=torch.zeros(3).int())),
        ("state_layout", change(state_layout="x")),
        ("backend", change(backend="x")),
    ],
)
def test_flush_names_the_bad_argument(name, changed):
    call = {"state": STATE, "num_accepted": torch.zeros(2).int(), **changed}
    # whichever of the two disagrees: a draft goes with one pool
    name = r"draft\.u" if name == "state" and changed["state"] is not None else name
    with kept(state=STATE, mark=DRAFT.mark), pytest.raises(cutemoe.InvalidCall, match=f"^{name}: "):
        DRAFT.flush(**call)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_slots", -1),
        ("max_tokens", 0),
        ("max_tokens", 1 << 14),
        ("num_q_heads", 0),
        ("num_v_heads", 3),
        ("head_dim", 1.5),
        ("head_dim_v", True),
        ("dtype", torch.float64),
    ],
)
def test_allocate_names_the_bad_argument(name, value):
    good = {"num_slots": 2, "max_tokens": 4, "num_q_heads": 2, "num_v_heads": 4, "head_dim": 8}
    with pytest.raises(cutemoe.InvalidCall, match=f"^{name}: "):
        cutemoe.GDNDraft.allocate(**{**good, "device": "cpu", name: value})


def test_a_gradient_is_refused_only_where_one_would_be_recorded():
    call = CALL | {"q": Q.clone().requires_grad_(), "state": STATE.clone()}
    with torch.no_grad():
        out = cutemoe.gdn_decode(**call)
    assert not out.requires_grad


def test_a_head_no_kernel_takes_is_refused_with_the_reason():
    call = Case(B=1, T=1, shape=(1, 1, 1024, 2)).call()
    with pytest.raises(cutemoe.Unsupported, match="DK <= 512 in layout"):
        cutemoe.gdn_decode(**call, backend="triton")
