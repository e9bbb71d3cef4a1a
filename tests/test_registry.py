"""Back ends as data: choice, refusals, explanations."""

import importlib

import pytest
import torch

import cutemoe
from cutemoe import InvalidCall, Unsupported
from cutemoe.registry import OPS
from cutemoe.runtime import backend
from cutemoe.runtime.backend import Backend, never, triton_unavailable
from cutemoe.runtime.device import Device

H200 = Device("cuda", 0, "H200", 90, 132, 232448, has_triton=True)
CPU = Device("cpu", has_triton=True)
ENTRY = "tests.test_registry:fake_run"


def fake_run(problem, config, tensors):
    """What a back end's entry looks like."""
    return problem, config, tensors


def only_small(problem, device):
    """A refusal that depends on the problem."""
    return None if problem < 10 else f"at most 9, got {problem}"


def needs_cuda(device):
    """A refusal that depends on the machine."""
    return None if device.type == "cuda" else f"needs a CUDA device, got {device}"


FAST = Backend("fast", ENTRY, needs_cuda, only_small, lambda problem, device: {"tile": problem})
SLOW = Backend("reference", ENTRY, never, never)
BACKENDS = (FAST, SLOW)


def choose(problem, device, requested="auto"):
    return backend.choose("op", BACKENDS, problem, device, requested)


def test_auto_takes_the_first_willing_one_on_a_gpu():
    assert choose(3, H200) is FAST


def test_auto_is_the_reference_on_a_cpu_even_where_an_interpreter_could_run():
    willing = Backend("fast", ENTRY, never, never)
    assert backend.choose("op", (willing, SLOW), 3, CPU, "auto") is SLOW


def test_a_slow_choice_on_a_gpu_warns_with_the_reasons():
    with pytest.warns(UserWarning, match=r"slow back end 'reference'.*fast: at most 9, got 12"):
        assert choose(12, H200) is SLOW


def test_a_requested_back_end_runs_or_says_why_not():
    assert choose(3, H200, "reference") is SLOW
    with pytest.raises(Unsupported, match=r"'fast' refuses 12 on H200.*: at most 9, got 12"):
        choose(12, H200, "fast")
    with pytest.raises(
        InvalidCall, match=r"^backend: expected 'auto' or one of 'fast', 'reference'"
    ):
        choose(3, H200, "cutlass")


def test_no_back_end_at_all_lists_every_reason():
    with pytest.raises(Unsupported, match=r"no back end for 12.*fast: at most 9, got 12"):
        backend.choose("op", (FAST,), 12, H200, "auto")


def test_a_machine_is_refused_before_the_problem():
    assert FAST.reason(12, CPU) == "needs a CUDA device, got cpu"
    assert FAST.reason(12, H200) == "at most 9, got 12"
    assert FAST.reason(3, H200) is None


def test_explain_is_what_choose_does():
    e = backend.explain("op", BACKENDS, 3, H200, "auto")
    assert (e.backend, e.config, e.problem) == ("fast", {"tile": 3}, 3)
    assert [r.reason for r in e.reasons] == [None, None]
    assert str(e).splitlines()[0] == "op on H200 (sm_90): fast"
    none = backend.explain("op", (FAST,), 12, CPU, "auto")
    assert none.backend is None and "no back end" in str(none)
    assert "fast: needs a CUDA device" in str(none)


def test_entries_load_once():
    assert FAST.load() is SLOW.load()
    assert FAST.load()(1, 2, 3) == (1, 2, 3)
    assert FAST.config(3, H200) == {"tile": 3} and SLOW.config(3, H200) is None


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        (H200, None),
        (Device("cuda", 0, "A100", 80, 108, 166912, has_triton=True), None),
        (
            Device("cuda", 0, "T4", 75, 40, 65536, has_triton=True),
            "needs sm_80 or newer, got sm_75",
        ),
        (Device("cuda", 0, "H200", 90), "triton is not installed"),
        (CPU, "needs a CUDA device, or TRITON_INTERPRET=1 before the first import, got cpu"),
        (Device("cpu", has_triton=True, interprets=True), None),
        (Device("mps", name="mps"), "triton is not installed"),
    ],
)
def test_where_triton_runs(device, reason):
    assert triton_unavailable(device) == reason


@pytest.mark.parametrize("name", OPS)
def test_every_op_lists_its_back_ends(name):
    rows = cutemoe.backends(name, "cpu")
    assert rows[-1].name == "reference" and rows[-1].reason is None
    assert rows == cutemoe.backends(getattr(cutemoe, name), "cpu")
    assert len({r.name for r in rows}) == len(rows) > 1


@pytest.mark.parametrize("name", OPS)
def test_every_entry_of_a_back_end_exists(name):
    """Imports the kernels: a misspelt entry would fail at the first call on a GPU only."""
    module, _, record = OPS[name].partition(":")
    for b in getattr(importlib.import_module(module), record).backends:
        if not b.entry.split(":")[0].rsplit(".", 1)[-1].startswith("cute_"):
            assert callable(b.load())


def test_an_unknown_op_is_answered_with_the_known_ones():
    for op in ("matmul", len):
        with pytest.raises(InvalidCall, match=r"^op: expected one of 'route', 'fused_moe'"):
            cutemoe.backends(op)


def test_explain_of_a_call():
    logits = torch.zeros(2, 4)
    e = cutemoe.explain(cutemoe.route, logits, 2)
    assert e.op == "route" and e.backend == "reference"
    with pytest.raises(InvalidCall, match=r"^top_k: "):
        cutemoe.explain("route", logits, 5)
