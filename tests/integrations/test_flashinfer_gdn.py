"""FlashInfer's three decoding functions: every parameter, against the float64 token loop."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch

from cutemoe import InvalidCall, Unsupported
from cutemoe.gdn import plan
from cutemoe.integrations import flashinfer
from tests.close import assert_same, assert_within
from tests.gdn.cases import Case, Target, oracle
from tests.poison import kept

SHAPE = (2, 4, 64, 64)


@pytest.fixture(
    params=[
        Target("reference", "cpu"),
        *(pytest.param(Target(b.name, "cuda"), marks=pytest.mark.gpu) for b in plan.DECODE),
    ],
    ids=str,
)
def target(request: pytest.FixtureRequest) -> Target:
    """The meaning on the CPU, every back end on a GPU."""
    request.param.available()
    return request.param


class Calls:
    """The arguments of one call in both vocabularies, on the device of a target."""

    def __init__(self, target: Target, T: int, **changes: Any) -> None:
        self.target = target
        self.case = Case(3, T, SHAPE, torch.bfloat16, spare=3).with_(**changes)
        self.call = self.case.call()
        self.pool = target.put(self.call["state"])
        self.index = target.put(self.call["state_indices"])
        names = ("q", "k", "v", "A_log", "a", "dt_bias", "b")
        self.given: dict[str, Any] = {n: target.put(self.call[n]) for n in names}
        self.given["backend"] = target.backend
        self.named = self.call["state_indices"].long()
        self.want = oracle(self.call)
        self.peer = oracle(self.call, torch.float32)

    def check(self, out: torch.Tensor, rows: Any = slice(None)) -> None:
        peer = self.peer.out.to(out.dtype)
        assert_within(out[rows], peer[rows], self.want.out[rows])

    def check_state(self, got: torch.Tensor, t: int = -1, rows: Any = slice(None)) -> None:
        """States [rows, HV, V, K] after token t."""
        peer, want = self.peer.states[rows, t], self.want.states[rows, t]
        assert_within(got, peer.to(got.dtype), want, "state")

    def mtp(self, **options: Any) -> torch.Tensor:
        pool = {"initial_state": self.pool, "initial_state_indices": self.index}
        options = {"disable_state_update": False} | options
        try:
            out, state = flashinfer.gated_delta_rule_mtp(**self.given | pool | options)
        except Unsupported as e:
            pytest.skip(str(e))
        assert state is self.pool or "initial_state" in options
        return out

    def pretranspose(self, **options: Any) -> torch.Tensor:
        pool = {"initial_state": self.pool, "initial_state_indices": self.index}
        call: dict[str, Any] = {"state": None} | self.given | pool | options
        return flashinfer.gated_delta_rule_decode_pretranspose(**call)[0]


# several tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
def test_mtp_updates_the_pool_in_place(target: Target, index: torch.dtype) -> None:
    x = Calls(target, 4, index=index)
    rest = [i for i in range(len(x.pool)) if i not in x.named.tolist()]
    old = x.pool[rest].clone()
    x.check(x.mtp())
    x.check_state(x.pool[x.named])
    assert_same(x.pool[rest], old, "other slots")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_mtp_output_has_the_dtype_of_q(target: Target, dtype: torch.dtype) -> None:
    x = Calls(target, 2, dtype=dtype)
    out = x.mtp()
    assert out.dtype == dtype
    x.check(out)


def test_mtp_scale_and_l2norm(target: Target) -> None:
    x = Calls(target, 3, l2norm=False)
    x.check(x.mtp(scale=0.25, use_qk_l2norm=False))
    x.check_state(x.pool[x.named])


@pytest.mark.parametrize("disabled", [True, None])
def test_mtp_without_update(target: Target, disabled: bool | None) -> None:
    x = Calls(target, 2)
    with kept(pool=x.pool), warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        x.check(x.mtp(disable_state_update=disabled))
    told = [w for w in seen if "disable_state_update" in str(w.message)]
    assert len(told) == (disabled is None)
    assert all(w.filename == __file__ for w in told)


@pytest.mark.parametrize("disabled", [True, False])
def test_mtp_buffer_may_have_more_rows_and_steps(target: Target, disabled: bool) -> None:
    """Token t of row b is [b, t], whatever the number of steps."""
    x = Calls(target, 3)
    HV, K, V = SHAPE[1:]
    buffer = torch.full((5, 6, HV, V, K), torch.nan, device=target.device)
    old = x.pool.clone()
    x.check(x.mtp(intermediate_states_buffer=buffer, disable_state_update=disabled))
    for t in range(3):
        x.check_state(buffer[:3, t], t)
    assert torch.isnan(buffer[:3, 3:]).all() and torch.isnan(buffer[3:]).all()
    if disabled:
        assert_same(x.pool, old, "pool")
    else:
        x.check_state(x.pool[x.named])


def test_mtp_padding_keeps_a_given_output(target: Target) -> None:
    x = Calls(target, 2)
    x.index[1] = -1
    old, live = x.pool.clone(), [0, 2]
    output = torch.full_like(x.given["v"], 7.0)
    HV, K, V = SHAPE[1:]
    buffer = torch.full((3, 2, HV, V, K), torch.nan, device=target.device)
    out = x.mtp(output=output, intermediate_states_buffer=buffer)
    assert out is output
    assert (out[1] == 7.0).all() and torch.isnan(buffer[1]).all()
    x.check(out, live)
    x.check_state(x.pool[x.named[live]], rows=live)
    rest = [i for i in range(len(old)) if i not in x.named[live].tolist()]
    assert_same(x.pool[rest], old[rest], "other slots")
    assert (x.mtp(disable_state_update=True)[1] == 0).all()


def test_mtp_output_of_another_dtype(target: Target) -> None:
    x = Calls(target, 2)
    output = torch.empty(x.given["v"].shape, dtype=torch.float32, device=target.device)
    out = x.mtp(output=output, disable_state_update=True)
    assert out is output
    assert_same(out, x.mtp(disable_state_update=True).float())


def test_mtp_output_indices(target: Target) -> None:
    """Row 0 writes the slot that row 1 reads; row 2 is computed and not stored."""
    x = Calls(target, 3)
    old, free = x.pool.clone(), [i for i in range(len(x.pool)) if i not in x.named.tolist()]
    writes = torch.tensor([int(x.named[1]), free[0], -1], device=target.device)
    x.check(x.mtp(output_state_indices=writes))
    x.check_state(x.pool[writes[:2]], rows=slice(0, 2))
    rest = [i for i in range(len(old)) if i not in writes.tolist()]
    assert_same(x.pool[rest], old[rest], "other slots")
    with kept(pool=x.pool):
        x.mtp(output_state_indices=writes, disable_state_update=True)
        x.mtp(output_state_indices=torch.full_like(writes, -1))


def test_mtp_a_slot_for_every_token(target: Target) -> None:
    """The state a row starts from stays; padding and negative slots store nothing."""
    x = Calls(target, 2, spare=9)
    old, free = x.pool.clone(), [i for i in range(len(x.pool)) if i not in x.named.tolist()]
    slots = torch.tensor([free[:2], [free[2], -1], free[3:5]], dtype=torch.int32)
    x.index[2] = -1
    out = x.mtp(ssm_state_indices=slots.to(target.device))
    x.check(out, slice(0, 2))
    assert (out[2] == 0).all()
    x.check_state(x.pool[free[:3:2]], 0, slice(0, 2))
    x.check_state(x.pool[free[1:2]], 1, slice(0, 1))
    rest = [i for i in range(len(old)) if i not in free[:3]]
    assert_same(x.pool[rest], old[rest], "other slots")


def test_mtp_refusals(target: Target) -> None:
    x = Calls(target, 2)
    slots = torch.zeros(3, 2, dtype=torch.int32, device=target.device)
    HV, K, V = SHAPE[1:]
    buffer = torch.empty(3, 2, HV, V, K, device=target.device)
    bad: list[tuple[str, dict[str, Any]]] = [
        ("ssm_state_indices", {"ssm_state_indices": slots, "intermediate_states_buffer": buffer}),
        ("disable_state_update", {"ssm_state_indices": slots, "disable_state_update": True}),
        ("ssm_state_indices", {"ssm_state_indices": slots[:, :1]}),
        ("ssm_state_indices", {"ssm_state_indices": slots.float()}),
        ("output_state_indices", {"output_state_indices": slots[0]}),
        ("intermediate_states_buffer", {"intermediate_states_buffer": buffer[:2]}),
        ("output", {"output": torch.empty(3, 2, HV, 1, device=target.device)}),
        ("state", {"initial_state": x.pool[:, :, :, :32]}),
    ]
    for name, options in bad:
        with pytest.raises(InvalidCall, match=rf"^{name}: "):
            x.mtp(**options)


# one token ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_pretranspose_state(target: Target, state: torch.dtype, T: int) -> None:
    x = Calls(target, T, state=state, spare=0, index=torch.int32)
    rows = x.pool[x.named].clone()
    output = torch.empty_like(x.given["v"])
    got, same = flashinfer.gated_delta_rule_decode_pretranspose(
        **x.given | {"state": rows, "output": output, "scale": None, "use_qk_l2norm": True}
    )
    assert got is output and same is rows
    x.check(got)
    x.check_state(rows)


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_pretranspose_pool(target: Target, state: torch.dtype) -> None:
    """A negative index is padding: a row of zeros, and no slot, not even slot 0, is touched."""
    x = Calls(target, 1, state=state)
    x.index[0] = -1
    old, live = x.pool.clone(), [1, 2]
    output = torch.full_like(x.given["v"], torch.nan)
    out = x.pretranspose(output=output)
    assert out is output and (out[0] == 0).all()
    x.check(out, live)
    x.check_state(x.pool[x.named[live]], rows=live)
    rest = [i for i in range(len(old)) if i not in x.named[live].tolist()]
    assert_same(x.pool[rest], old[rest], "other slots")


def test_pretranspose_output_indices(target: Target) -> None:
    x = Calls(target, 1)
    old, free = x.pool.clone(), [i for i in range(len(x.pool)) if i not in x.named.tolist()]
    writes = torch.tensor([free[0], -1, int(x.named[0])], dtype=torch.int32, device=target.device)
    out = x.pretranspose(output_state_indices=writes)
    live = [0, 2]
    x.check(out, live)
    assert (out[1] == 0).all()
    x.check_state(x.pool[writes[live].long()], rows=live)
    rest = [i for i in range(len(old)) if i not in writes[live].tolist()]
    assert_same(x.pool[rest], old[rest], "other slots")


def test_pretranspose_page_strided_pool(target: Target) -> None:
    x = Calls(target, 1)
    HV, K, V = SHAPE[1:]
    pages = torch.full((len(x.pool), HV * V * K + 32), torch.nan, device=target.device)
    pool = pages[:, 32:].view(len(x.pool), HV, V, K).copy_(x.pool)
    x.check(x.pretranspose(initial_state=pool))
    x.check_state(pool[x.named])
    assert torch.isnan(pages[:, :32]).all()


def test_pretranspose_refusals(target: Target) -> None:
    x = Calls(target, 1)
    rows = x.pool[:3].clone()
    bad: list[tuple[str, dict[str, Any]]] = [
        ("initial_state_indices", {"initial_state_indices": None}),
        ("initial_state_indices", {"initial_state": None}),
        ("state", {"initial_state": None, "initial_state_indices": None}),
        ("output_state_indices", {"state": rows, "initial_state": None,
                                  "initial_state_indices": None, "output_state_indices": x.index}),
        ("output_state_indices", {"output_state_indices": x.index[:2]}),
        ("state", {"state": rows[:2], "initial_state": None, "initial_state_indices": None}),
    ]  # fmt: skip
    for name, options in bad:
        with pytest.raises(InvalidCall, match=rf"^{name}: "):
            x.pretranspose(**options)


@pytest.mark.parametrize("strided", [False, True])
def test_decode_keeps_v_last(target: Target, strided: bool) -> None:
    """`strided` gives a view whose last dimension is not contiguous."""
    x = Calls(target, 1, spare=0)
    rows = x.pool[x.named]
    state = rows.clone().transpose(-1, -2)
    state = state if strided else state.contiguous()
    output = torch.empty_like(x.given["v"])
    got, same = flashinfer.gated_delta_rule_decode(**x.given | {"state": state, "output": output})
    assert got is output and same is state
    x.check(got)
    x.check_state(state.transpose(-1, -2))


def test_decode_scale_and_l2norm(target: Target) -> None:
    x = Calls(target, 1, spare=0, l2norm=False)
    state = x.pool[x.named].transpose(-1, -2).contiguous()
    options = {"state": state, "scale": 0.25, "use_qk_l2norm": False}
    x.check(flashinfer.gated_delta_rule_decode(**x.given | options)[0])


# the door -----------------------------------------------------------------------------------------

TENSORS = ["A_log", "a", "dt_bias", "b", "scale", "output"]
SIGNATURES = {
    "gated_delta_rule_mtp": [
        "q", "k", "v", "initial_state", "initial_state_indices", *TENSORS,
        "intermediate_states_buffer", "ssm_state_indices", "disable_state_update", "use_qk_l2norm",
        "output_state_indices",
    ],
    "gated_delta_rule_decode_pretranspose": [
        "q", "k", "v", "state", *TENSORS, "use_qk_l2norm", "initial_state",
        "initial_state_indices", "output_state_indices",
    ],
    "gated_delta_rule_decode": ["q", "k", "v", "state", *TENSORS, "use_qk_l2norm"],
}  # fmt: skip


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_order_of_arguments_is_flashinfers(name: str) -> None:
    parameters = inspect.signature(getattr(flashinfer, name)).parameters
    keyword = inspect.Parameter.KEYWORD_ONLY
    assert [n for n, p in parameters.items() if p.kind != keyword] == SIGNATURES[name]
    optional = {n for n, p in parameters.items() if p.default is None}
    assert {"scale", "output"} <= optional
    assert parameters["use_qk_l2norm"].default is True


def test_the_door_is_lazy_and_lists_what_it_has() -> None:
    assert set(SIGNATURES) <= set(flashinfer.__all__) <= set(dir(flashinfer))
    for name in flashinfer.__all__:
        assert callable(getattr(flashinfer, name))
    with pytest.raises(AttributeError, match="no attribute 'sampling'"):
        _ = flashinfer.sampling  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.gpu
def test_the_calls_are_captured_in_a_graph() -> None:
    """With split slots, a slot a token and padding: nothing asks the device."""
    x = Calls(Target("auto", "cuda"), 2, spare=9)
    x.index[1] = -1
    free = [i for i in range(len(x.pool)) if i not in x.named.tolist()]
    slots = torch.tensor([free[:2], free[2:4], [free[4], -1]], dtype=torch.int32, device="cuda")
    writes = torch.tensor([free[5], free[6], -1], device="cuda")
    output = torch.zeros_like(x.given["v"])

    def run() -> None:
        x.mtp(ssm_state_indices=slots)
        x.mtp(output_state_indices=writes, output=output)

    first = x.pool.clone()
    run()
    want, want_out = x.pool.clone(), output.clone()
    x.pool.copy_(first)
    output.zero_()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    x.pool.copy_(first)
    graph.replay()
    assert_same(x.pool, want, "pool")
    assert_same(output, want_out)
