"""What only a GPU shows: graphs, no synchronisation, far offsets, streams, large batches."""

import pytest
import torch

from tests import strategies as draw
from tests.close import assert_same, assert_within
from tests.gdn.cases import Case, Target, oracle

pytestmark = pytest.mark.gpu
REAL = Case(8, 4, (4, 8, 128, 128), torch.bfloat16)


@pytest.fixture(params=["reference", "triton", "cute"])
def gpu(request) -> Target:
    """Every back end on the GPU."""
    target = Target(request.param, "cuda")
    target.available()
    return target


def test_a_graph_replays_a_decode_and_nothing_synchronises(gpu):
    call = gpu.put(REAL.call())
    twin = call | {"state": call["state"].clone()}
    out = torch.empty_like(call["v"])
    gpu.decode(**call | {"state": call["state"].clone()}, out=out)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.graph(graph):
            gpu.decode(**call, out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for seed in (1, 2):
        fresh = gpu.put(REAL.with_(seed=seed).call())
        for name in ("q", "k", "v", "a", "b"):
            call[name].copy_(fresh[name])
        graph.replay()
        assert_same(out, gpu.decode(**twin | {n: fresh[n] for n in ("q", "k", "v", "a", "b")}))
        assert_same(call["state"], twin["state"], "state")


def test_a_graph_replays_a_verification(gpu):
    """The windows and their halves live on the device: every replay takes the next window."""
    call = gpu.put(REAL.call())
    drafts = [REAL.draft(4, "cuda", torch.bfloat16) for _ in range(2)]
    n = torch.zeros(REAL.B, dtype=torch.int32, device="cuda")
    out = torch.empty_like(call["v"])
    warm = REAL.draft(4, "cuda", torch.bfloat16)
    gpu.verify(**call | {"state": call["state"].clone()}, draft=warm, num_accepted=n, out=out)
    torch.cuda.synchronize()
    twin = call | {"state": call["state"].clone()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gpu.verify(**call, draft=drafts[0], num_accepted=n, out=out)
    for seed in range(5):
        n.copy_(torch.randint(0, 5, n.shape, generator=draw.generator(seed)))
        graph.replay()
        assert_same(out, gpu.verify(**twin, draft=drafts[1], num_accepted=n))
        assert_same(call["state"], twin["state"], "state")


@pytest.mark.parametrize("far", ["slot", "row", "snapshot"])
def test_offsets_beyond_31_bits(gpu, far):
    case = Case(B=2, T=2, shape=(1, 1, 64, 64), dtype=torch.bfloat16, state=torch.bfloat16, spare=0)
    call = gpu.put(case.call())
    call["state_indices"] = gpu.put(torch.tensor([1, 0]))
    want, peer = oracle({k: _cpu(x) for k, x in call.items()}), call["state"].clone()
    memory = torch.full((2**31 + 2**20,), torch.nan, dtype=torch.bfloat16, device="cuda")
    strides = {"slot": (2**31, 4096, 64, 1), "row": (64, 64, 2**25 + 128, 1)}.get(far)
    if strides is not None:
        state = memory.as_strided((2, 1, 64, 64), strides).copy_(call["state"])
        plain = call | {"state": peer}
        assert_same(gpu.decode(**call | {"state": state}), gpu.decode(**plain))
        assert_same(state, peer, "state")
        return
    snapshots = memory.as_strided((2, 2, 1, 64, 64), (8192, 2**31, 4096, 64, 1))
    gpu.decode(**call, intermediate_states=snapshots)
    assert_same(snapshots[:, -1], call["state"][[1, 0]], "state")
    near = oracle({k: _cpu(x) for k, x in call.items()} | {"state": peer.cpu()}, torch.float32)
    assert_within(snapshots, near.states.bfloat16(), want.states, "intermediate states")


def _cpu(x):
    return x.cpu() if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("layout", ["vk", "kv"])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_a_large_batch_has_the_bits_of_a_small_one(gpu, layout, state):
    """300 sequences take another tile than 2; with snapshots or without, the bits are the same.

    CuTe takes the tokens into the state at once where nobody asks for the states between, so there
    its last bits are others, and in layout "vk" those of outputs too.
    """
    case = Case(300, 3, (2, 4, 128, 128), torch.bfloat16, state, layout, spare=1)
    call = gpu.put(case.call())
    few = {
        k: x[:2].clone() if k in ("q", "k", "v", "a", "b", "state_indices") else x
        for k, x in call.items()
    }
    few["state"] = call["state"].clone()
    more = call | {"state": call["state"].clone()}
    snapshots = gpu.put(case.snapshots())
    out = gpu.decode(**call)
    other = gpu.decode(**more, intermediate_states=snapshots)
    if (gpu.backend, layout) != ("cute", "vk"):
        assert_same(other, out)
    if gpu.backend != "cute":
        assert_same(more["state"], call["state"], "state")
    assert_same(gpu.decode(**few), out[:2])
    named = few["state_indices"].long()
    assert_same(few["state"][named], call["state"][named], "state")


def test_more_sequences_than_a_grid_dimension_holds(gpu):
    case = Case(B=70000, T=1, shape=(1, 1, 8, 8), spare=0)
    call = gpu.put(case.call())
    part = {
        k: x[-5:].clone() if k in ("q", "k", "v", "a", "b", "state_indices") else x
        for k, x in call.items()
    }
    part["state"] = call["state"].clone()
    assert_same(gpu.decode(**call)[-5:], gpu.decode(**part))


def test_misaligned_views(gpu):
    """Odd offsets and strides change which loads are wide, and nothing but rounding."""
    case = Case(3, 3, (1, 2, 64, 64), torch.bfloat16)
    call = case.call()
    want, peer = oracle(call), oracle(call, torch.float32)
    call = gpu.put(call)
    for name in ("q", "k", "v"):
        big = torch.empty(*call[name].shape[:3], 67, dtype=case.dtype, device="cuda")
        call[name] = big[..., 3:].copy_(call[name])
    big = torch.empty(case.slots(), 2, 64, 67, device="cuda")
    call["state"] = big[..., 1:65].copy_(call["state"])
    assert_within(gpu.decode(**call), peer.out.to(case.dtype), want.out)
    named = call["state_indices"].long()
    assert_within(call["state"][named], peer.states[:, -1], want.states[:, -1], "state")


def test_a_side_stream_is_honoured(gpu):
    call = gpu.put(REAL.call())
    want = gpu.decode(**call | {"state": call["state"].clone()})
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        q = call["q"] + 0
        got = gpu.decode(**call | {"q": q})
    torch.cuda.current_stream().wait_stream(side)
    assert_same(got, want)
