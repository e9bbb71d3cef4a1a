"""Draft verification is decoding of the accepted tokens: the state has the same bits.

CuTe decodes a single token of layout "vk" by other sums than a window: there rounding may differ.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cutemoe
from tests import strategies as draw
from tests.close import assert_same
from tests.gdn.cases import NATIVE, Case, Target, cases
from tests.gdn.test_properties import tokens
from tests.poison import Poison, kept
from tests.strategies import examples


class Twin:
    """A pool with drafts beside a pool that only ever sees accepted tokens, one call a window."""

    def __init__(self, target: Target, case: Case, max_tokens: int, record: torch.dtype) -> None:
        self.target, self.case, self.max_tokens = target, case, max_tokens
        self.first = target.put(case.call())
        self.state = self.first["state"].clone()
        self.sure = self.first["state"].clone()
        self.draft = case.draft(max_tokens, target.device, record)
        for x in (self.draft.u, self.draft.k, self.draft.k_rnorm, self.draft.log_g):
            x.fill_(torch.nan)
        self.window: dict | None = None
        self.length = 0
        self.alone = target.backend == "cute" and case.layout == "vk"

    def settle(self, accepted: torch.Tensor) -> list[int]:
        """The accepted tokens of the open window enter the sure pool; slots that may be rounded
        in another way."""
        rounded = []
        for b in range(self.case.B):
            n = min(max(int(accepted[b]), 0), self.length)
            if self.window is None or n == 0:
                continue
            if n == 1 and self.alone:
                rounded.append(int(self.first["state_indices"][b]))
            row = {k: x[b : b + 1] if k != "state" and k in ROWS else x
                   for k, x in tokens(self.window, slice(0, n)).items()}  # fmt: skip
            self.target.decode(**row | {"state": self.sure})
        return rounded

    def compare(self, rounded: list[int]) -> None:
        """Both pools agree; from here on to the bit."""
        for slot in rounded:
            self.near(self.state[slot], self.sure[slot])
            self.sure[slot] = self.state[slot]
        assert_same(self.state, self.sure, "state")

    def near(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Within two units in the last place of the largest value."""
        unit = torch.finfo(x.dtype).eps * y.abs().max().clamp(min=1e-3)
        limit = 2 * unit if x.dtype != torch.float32 else 16 * unit
        assert ((x.float() - y.float()).abs() <= limit.float()).all()

    def round(self, T: int, accepted: torch.Tensor, seed: int) -> None:
        call = self.target.put(self.case.with_(T=T, seed=seed).call())
        call["state_indices"] = self.first["state_indices"]
        for name in ("A_log", "dt_bias"):
            if name in self.first:
                call[name] = self.first[name]
        rounded = self.settle(accepted)
        out = self.target.verify(
            **call | {"state": self.state},
            draft=self.draft,
            num_accepted=accepted.to(self.target.device),
        )
        self.compare(rounded)
        want = self.target.decode(**call | {"state": self.sure}, update_state=False)
        if T == 1 and self.alone:
            self.near(out, want)
        else:
            assert_same(out, want)
        self.window, self.length = call, T
        named = self.first["state_indices"].long()
        assert (self.draft.count[named] == T).all()

    def flush(self, accepted: torch.Tensor) -> None:
        rounded = self.settle(accepted)
        self.draft.flush(
            self.state,
            accepted.to(self.target.device),
            self.first["state_indices"],
            self.case.layout,
            backend=self.target.backend,
        )
        self.compare(rounded)
        assert (self.draft.count == 0).all()
        self.length = 0


ROWS = ("q", "k", "v", "a", "b", "g", "beta", "state_indices")


@settings(max_examples=examples(0.3))
@given(
    case=cases(index=torch.int32, T=0),
    rounds=st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=4),
    compact=st.booleans(),
    kind=st.sampled_from((torch.int32, torch.int64)),
    seed=draw.seeds(),
)
def test_states_have_the_bits_of_decoding(target, case, rounds, compact, kind, seed):
    case = target.fit(case)
    twin = Twin(target, case, 3, case.dtype if compact else torch.float32)
    g = draw.generator(seed)

    def accepted() -> torch.Tensor:
        return torch.randint(-1, twin.length + 2, (case.B,), generator=g).to(kind)

    for i, (T, flush) in enumerate(rounds):
        twin.round(T, accepted(), seed + 20 * i)
        if flush:
            twin.flush(accepted())
    twin.flush(accepted())


@pytest.mark.parametrize("shape", NATIVE, ids=str)
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_head_sizes_of_real_models(target, shape, state, dtype):
    if target.device == "cpu" and shape != NATIVE[-1]:
        pytest.skip("half a minute each in the interpreter")
    case = Case(B=2 if target.device == "cuda" else 1, T=0, shape=shape, dtype=dtype, state=state)
    twin = Twin(target, case, 8, dtype)
    g = draw.generator(3)
    for i, T in enumerate((2, 1) if target.device == "cpu" else (4, 8, 1, 5, 8, 0, 3)):
        accepted = torch.randint(0, twin.length + 1, (case.B,), generator=g)
        twin.round(T, accepted, 100 * i)
    twin.flush(torch.full((case.B,), 9))


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_windows_of_more_tokens_than_are_folded_at_once(target, state):
    cpu = target.device == "cpu"
    case = Case(B=2, T=0, shape=(1, 2, 64, 16 if cpu else 64), dtype=torch.bfloat16, state=state)
    # torch's softplus on a CPU rounds by the place in a vector
    case = case.with_(raw=target.backend != "reference")
    twin = Twin(target, case, 20, torch.bfloat16)
    g = draw.generator(7)
    for i, T in enumerate((11, 2) if cpu else (20, 8, 11, 3, 17, 20)):
        accepted = torch.randint(twin.length // 2, twin.length + 1, (case.B,), generator=g)
        twin.round(T, accepted, 100 * i)
    twin.flush(torch.full((case.B,), 21))


@pytest.mark.gpu
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["vk", "kv"])
def test_many_rounds_of_a_real_batch(target, state, layout):
    """Enough programs to overlap and to change the tile, windows of every length."""
    if target.device == "cpu":
        pytest.skip("64 sequences take minutes in the interpreter")
    case = Case(64, 0, (4, 8, 128, 128), torch.bfloat16, state, layout)
    twin = Twin(target, case, 8, torch.bfloat16)
    g = draw.generator(5)
    for i in range(12):
        accepted = torch.randint(0, twin.length + 1, (case.B,), generator=g)
        twin.round(1 + i % 8, accepted, 100 * i)
    twin.flush(torch.full((case.B,), 9))


@settings(max_examples=examples(0.5))
@given(case=cases(index=torch.int32, T=1, B=3), seed=draw.seeds())
def test_padding_touches_nothing(target, case, seed):
    """Two rounds in which rows come and go: a padding row keeps its state and its window."""
    case = target.fit(case)
    call = target.put(case.call())
    live = torch.rand(3, generator=draw.generator(seed)) < 0.5
    padding = torch.tensor([-1, -5, case.slots()], dtype=torch.int32)
    index = call["state_indices"].cpu()
    draft = case.draft(3, target.device)
    with Poison(target.device) as poison:
        draft = cutemoe.GDNDraft(*(poison.of(x) for x in draft.tensors))
        state = poison.of(call["state"])
        plenty = target.put(torch.full((3,), 9))
        call["state"] = state
        target.verify(**call, draft=draft, num_accepted=plenty)
        call["state_indices"] = torch.where(live, index, padding).to(target.device)
        rest = [p for p in range(case.slots()) if p not in index[live].tolist()]
        rows = {n: x[rest] for n, x in zip("ukrlm", draft.tensors, strict=True)}
        old = state[rest].clone()
        out = target.verify(**call, draft=draft, num_accepted=plenty)
        assert (out[~live.to(target.device)] == 0).all()
        assert_same(state[rest], old, "state")
        for n, x in zip("ukrlm", draft.tensors, strict=True):
            assert torch.equal(_bytes(x[rest]), _bytes(rows[n])), n


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.flatten().contiguous().view(torch.uint8)


def test_a_fresh_draft_is_empty_whatever_is_said_to_be_accepted(target):
    case = Case(B=2, T=2)
    call = target.put(case.call())
    draft = case.draft(4, target.device)
    draft.u.fill_(torch.nan)
    with kept(state=call["state"]):
        target.verify(**call, draft=draft, num_accepted=target.put(torch.tensor([4, 2**31 - 1])))
    assert sorted(draft.count.tolist()) == [0, 0, 2, 2]


def test_no_sequences_and_no_slots(target):
    case = Case(B=0, T=2)
    call = target.put(case.call())
    draft = case.draft(2, target.device)
    none = target.put(torch.zeros(0, dtype=torch.int32))
    with kept(state=call["state"], mark=draft.mark):
        assert target.verify(**call, draft=draft, num_accepted=none).shape == call["v"].shape


def test_the_memory_of_a_draft():
    draft = cutemoe.GDNDraft.allocate(3, 4, 2, 4, 8, head_dim_v=6, device="cpu")
    assert draft.u.shape == (3, 4, 4, 6) and draft.k.shape == (3, 2, 4, 2, 8)
    assert draft.k.dtype == torch.float32 and draft.max_tokens == 4
    assert draft.count.tolist() == [0, 0, 0] and draft.count.dtype == torch.int32
