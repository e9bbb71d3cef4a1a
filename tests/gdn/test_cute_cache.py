"""Compiled kernels are kept by configuration, and what a launch adds to one is right."""

from dataclasses import replace

import pytest
import torch

from cutemoe.gdn import cute_plan
from cutemoe.runtime import compile as cache
from cutemoe.runtime.compile import cute_unavailable
from cutemoe.runtime.device import Device


def test_a_configuration_is_built_once():
    built = []

    @cache.compiled
    def build(config):
        built.append(config)
        return lambda: config

    before = cache.build_count()
    a, b, c = cute_plan.Config(), cute_plan.Config(), cute_plan.Config(tile=4)
    assert build(a) is build(b) and build(c)() == c
    assert built == [a, c] and cache.build_count() == before + 2


def test_two_builders_do_not_share():
    one, two = (cache.compiled(lambda config, i=i: (i, config)) for i in range(2))
    assert one("key") == (0, "key") and two("key") == (1, "key")


def test_a_failed_build_is_tried_again():
    answers = [RuntimeError("no"), "kernel"]

    @cache.compiled
    def build(_):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(RuntimeError, match="no"):
        build("failing once")
    assert build("failing once") == "kernel"


@pytest.mark.parametrize(
    "device, reason",
    [
        (Device("cpu"), "needs a CUDA device"),
        (Device("cuda", arch=75), "needs sm_80 or newer, got sm_75"),
    ],
    ids=str,
)
def test_devices_it_does_not_run_on(device, reason):
    assert reason in (cute_unavailable(device) or "")


def test_a_missing_package_is_the_reason(monkeypatch):
    monkeypatch.setattr(cache.importlib.util, "find_spec", lambda name: None)
    cache._missing.cache_clear()
    try:
        reason = cute_unavailable(Device("cuda", arch=90))
        assert reason == "nvidia-cutlass-dsl is not installed"
    finally:
        cache._missing.cache_clear()


def tensors(offset=0, dtype=torch.bfloat16, state=torch.float32):
    """A call whose every tensor starts `offset` elements into its memory."""
    from cutemoe.gdn.tensors import GDNTensors

    def make(*shape, dtype=dtype):
        flat = torch.zeros(torch.Size(shape).numel() + offset, dtype=dtype)
        return flat[offset:].view(shape)

    q, v = make(2, 3, 1, 128), make(2, 3, 2, 128)
    gates = (
        make(2, 3, 2),
        make(2, 3, 2),
        make(2, dtype=torch.float32),
        make(2, dtype=torch.float64),
    )
    pool = make(4, 2, 128, 128, dtype=state)
    index = torch.zeros(2, dtype=torch.int64)
    return GDNTensors(q, q, v, gates, pool, v, 1.0, index)


def test_dtypes_and_alignment_complete_a_configuration():
    pytest.importorskip("cutlass")
    from cutemoe.gdn.cute_launch import complete

    config = cute_plan.Config()
    c = complete(config, tensors())
    assert c.gates == ("bfloat16", "bfloat16", "float32", "float64")
    assert c.index == "int64" and c.accepted == "" and c.wide == (True,) * 4
    assert complete(config, tensors(1)).wide == (False, False, False, True)
    assert complete(config, tensors(4)).wide == (True, True, True, True)
    aligned_for_pairs = complete(replace(config, layout="kv"), tensors(2))
    assert aligned_for_pairs.wide == (False, False, True, True)


def test_rows_too_far_apart_are_unsupported():
    pytest.importorskip("cutlass")
    import cutemoe
    from cutemoe.gdn.cute_launch import _check_reach

    x = tensors()
    far = torch.empty_strided((2, 3, 1, 128), (0, 1 << 30, 0, 1), device="meta")
    with pytest.raises(cutemoe.Unsupported, match="q: back end 'cute'"):
        _check_reach(x._replace(q=far))
