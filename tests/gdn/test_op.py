"""The registered operators: opcheck, torch.compile, explain, the choice of a back end."""

import pytest
import torch

import cutemoe
from cutemoe.gdn import api
from cutemoe.gdn.plan import configure
from cutemoe.gdn.problem import Problem
from cutemoe.runtime.device import Device
from tests.close import assert_same
from tests.gdn.cases import NATIVE, Case, Target

CASES = {
    "raw": Case(B=2, T=3),
    "given": Case(B=2, T=2, raw=False, dtype=torch.bfloat16, layout="kv", index=None),
    "empty": Case(B=0, T=1),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def shape(target: Target) -> tuple[int, int, int, int]:
    """Head sizes that the back end takes, small where it takes any."""
    return NATIVE[0] if target.backend == "cute" else Case().shape


def accepted(case: Case) -> torch.Tensor:
    return torch.ones(case.B, dtype=torch.int32)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("update", [True, False])
def test_opcheck_decode(name, update):
    case = CASES[name]
    call = case.call()
    if update:
        call["intermediate_states"] = torch.zeros_like(case.snapshots())
    args = api._decode_call(**call, update_state=update)
    torch.library.opcheck(torch.ops.cutemoe.gdn_decode.default, args)


@pytest.mark.parametrize("name", CASES)
def test_opcheck_verify(name):
    case = CASES[name]
    draft = case.draft(4, "cpu")
    for x in draft.tensors:
        x.zero_()
    args = api._verify_call(**case.call(), draft=draft, num_accepted=accepted(case))
    torch.library.opcheck(torch.ops.cutemoe.gdn_verify.default, args)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_decode(target, dynamic):
    def model(q, state, call, out):
        return 2 * cutemoe.gdn_decode(q + 0, state=state, out=out, backend=target.backend, **call)

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for B, T, own in ((2, 3, False), (1, 3, True), (2, 1, False)):
        call = target.put(Case(B, T, shape(target)).call())
        q, state = call.pop("q"), call.pop("state")
        call["intermediate_states"] = torch.zeros(B, T, *state.shape[1:], device=state.device)
        other = call | {"intermediate_states": torch.zeros_like(call["intermediate_states"])}
        out = torch.empty_like(call["v"]) if own else None
        twin = state.clone()
        assert_same(compiled(q, state, call, out), model(q, twin, other, None))
        assert_same(state, twin, "state")
        for name in ("intermediate_states",):
            assert_same(call[name], other[name], name)


def test_compile_verify_and_flush(target):
    def model(q, state, draft, n, call):
        out = cutemoe.gdn_verify(
            q, state=state, draft=draft, num_accepted=n, backend=target.backend, **call
        )
        draft.flush(state, n, call["state_indices"], backend=target.backend)
        return out

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    case = Case(2, 2, shape(target))
    call = target.put(case.call())
    q, state = call.pop("q"), call.pop("state")
    twin, n = state.clone(), target.put(accepted(case))
    drafts = [case.draft(2, target.device) for _ in range(2)]
    for _ in range(2):
        got = compiled(q, state, drafts[0], n, call)
        assert_same(got, model(q, twin, drafts[1], n, call))
        assert_same(state, twin, "state")
    assert (drafts[0].count == 0).all()


def test_explain_needs_no_memory():
    call = {k: x.to("meta") if isinstance(x, torch.Tensor) else x
            for k, x in Case(4, 2, (16, 32, 128, 128)).call().items()}  # fmt: skip
    found = cutemoe.explain("gdn_decode", **call)
    assert found.backend == "reference" and found.problem.HV == 32 and found.problem.T == 2
    assert {r.name for r in found.reasons} >= {"triton", "reference"}
    draft = cutemoe.GDNDraft.allocate(6, 2, 16, 32, 128, device="meta")
    n = torch.zeros(4, dtype=torch.int32, device="meta")
    found = cutemoe.explain(cutemoe.gdn_verify, **call, draft=draft, num_accepted=n)
    assert found.problem.window == 2 and found.problem.record == "float32"


@pytest.mark.parametrize("layout", ["vk", "kv"])
@pytest.mark.parametrize("state", ["float32", "bfloat16"])
@pytest.mark.parametrize("DK", [1, 2, 3, 8, 20, 64, 100, 128, 256, 512])
def test_a_tile_is_whole_and_fits_the_registers(layout, state, DK):
    """32 lanes hold a chunk, and at most 96 numbers of a tile each."""
    device = Device("cuda", arch=90, sm_count=132, has_triton=True)
    for B in (1, 512):
        problem = Problem(
            B, 4, 1, 32, DK, 128, B, "bfloat16", state, "raw", layout, True, True, True
        )
        c = configure(problem, device)
        chunks = -(-DK // c.block_k)
        assert c.block_v % c.rows == 0
        assert all(n & (n - 1) == 0 for n in (c.block_v, c.rows, c.block_k, c.vector))
        assert c.block_v * chunks * c.block_k <= 96 * 32
