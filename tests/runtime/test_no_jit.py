"""CUTEMOE_NO_JIT and presets: what the error says, and what is counted."""

from dataclasses import dataclass

import pytest

import cutemoe
from cutemoe.runtime import backend as back_ends
from cutemoe.runtime import compile as compiling
from cutemoe.runtime import preset
from cutemoe.runtime.backend import Backend, never
from cutemoe.runtime.compile import NotCompiled, build_count, compiled, no_jit
from cutemoe.runtime.device import CARDS, Device, compile_only, target
from tests.runtime.objects import cubin

H200 = Device("cuda", 0, "H200", 90, 132, 232448, True)


@dataclass(frozen=True)
class Config:
    size: int = 1


def build(config: Config):
    """A kernel without an object: it stays in the process."""
    return lambda: config.size


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    monkeypatch.setenv("CUTEMOE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CUTEMOE_NO_JIT", raising=False)
    monkeypatch.setattr(compiling, "_KERNELS", {})


@pytest.mark.parametrize("value", ["1", "yes"])
def test_the_variable_turns_a_build_into_an_error(monkeypatch, value):
    before = build_count()
    monkeypatch.setenv("CUTEMOE_NO_JIT", value)
    with pytest.raises(NotCompiled, match=r"^CUTEMOE_NO_JIT: expected a compiled kernel in .*size"):
        compiled(build)(Config(3))
    monkeypatch.setenv("CUTEMOE_NO_JIT", "0")
    assert compiled(build)(Config(3))() == 3 and build_count() == before + 1


def test_the_context_manager_too():
    kernel = compiled(build)
    kernel(Config(1))
    with no_jit():
        assert kernel(Config(1))() == 1
        with pytest.raises(NotCompiled):
            kernel(Config(2))
    assert kernel(Config(2))() == 2


def test_what_is_on_disk_needs_no_build():
    make = lambda: (cubin(90), {"kernel": "k"})  # noqa: E731
    compiling.fetch("k", ("kept",), "sm_90a", make)
    loads = compiling.load_count()
    with no_jit():
        assert compiling.fetch("k", ("kept",), "sm_90a", make).data == cubin(90)
        with pytest.raises(NotCompiled):
            compiling.fetch("k", ("not kept",), "sm_90a", make)
    assert compiling.load_count() == loads + 1


@pytest.mark.parametrize(
    ("sizes", "names"),
    [
        ({"hidden": 2880, "intermediate": 2880, "experts": 128, "top_k": 4}, ["gpt-oss-120b"]),
        ({"HQ": 16, "HV": 32, "DK": 128, "DV": 128}, ["qwen3-next"]),
        ({"groups": 256, "n": 4096, "k": 4096}, ["headline"]),
        ({"tokens": 3, "experts": 256, "top_k": 8}, ["deepseek-v3"]),
        ({"hidden": 64, "intermediate": 2880, "experts": 128, "top_k": 4}, []),
    ],
    ids=str,
)
def test_the_error_names_the_preset(sizes, names):
    problem = type("Problem", (), sizes)()
    assert preset.covering(problem) == names

    def refuse(*_):
        compiling.check_allowed("the kernel")

    b = Backend("cute", "nowhere:run", never, never)
    with pytest.MonkeyPatch.context() as patch, no_jit():
        patch.setattr(back_ends, "_load", lambda entry: refuse)
        with pytest.raises(NotCompiled) as e:
            b.run(problem, H200, None)
    assert "cutemoe compile --arch sm_90a" in str(e.value)
    for name in names or preset.PRESETS:
        assert name in str(e.value)


def test_a_target_stands_for_every_device():
    import torch

    assert target() is None
    with compile_only("sm_120a") as card:
        assert target() is card and card.arch == 120 and card.target == "sm_120a"
        assert Device.of(torch.device("cpu")) is card
    assert target() is None and Device.of(torch.device("cpu")).type == "cpu"


@pytest.mark.parametrize("arch", CARDS)
def test_names_of_architectures(arch):
    with compile_only(arch) as card:
        assert card.target == arch


def test_an_architecture_no_kernel_is_for():
    with pytest.raises(cutemoe.InvalidCall, match="arch: expected one of sm_80"), compile_only("x"):
        pass
