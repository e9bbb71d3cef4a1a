import dataclasses

import pytest
import workloads
from workloads import GDN_BATCHES, GDN_MODES, MOE_BATCHES, WORKLOADS, GDNWorkload, MoEWorkload


def test_shapes_of_the_issue_have_their_names() -> None:
    shapes = {
        "headline": (4096, 2048, 256, 6),
        "gpt_oss_120b": (2880, 2880, 128, 4),
        "gpt_oss_20b": (2880, 2880, 32, 4),
        "deepseek_v3": (7168, 2048, 256, 8),
        "qwen3_next": (2048, 512, 512, 10),
    }
    for name, shape in shapes.items():
        w = WORKLOADS[name]
        assert isinstance(w, MoEWorkload)
        assert (w.hidden, w.intermediate, w.experts, w.top_k) == shape
        assert w.batches == MOE_BATCHES and w.op == "fused_moe"


def test_skewed_routing_is_measured_on_the_headline_shape() -> None:
    for name in ("headline_one", "headline_zipf", "headline_w4a8_one", "headline_w4a8_zipf"):
        w = WORKLOADS[name]
        assert isinstance(w, MoEWorkload) and name.endswith(w.skew)


@pytest.mark.parametrize("shape", ["headline", "qwen3_next"])
@pytest.mark.parametrize(("suffix", "format"), [("w4a4", "nvfp4"), ("mxfp4_w4a4", "mxfp4")])
def test_fp4_activations_are_measured_on_whole_layers(shape: str, suffix: str, format: str) -> None:
    w, plain = WORKLOADS[f"{shape}_{suffix}"], WORKLOADS[shape]
    assert isinstance(w, MoEWorkload) and (w.weights, w.activations) == (format, format)
    as_plain = dataclasses.replace(w, name=shape, weights="mxfp4", activations="bf16")
    assert as_plain == plain
    assert f"{w.name}_g1" not in WORKLOADS


def test_gdn_covers_the_grid() -> None:
    found = [w for w in WORKLOADS.values() if isinstance(w, GDNWorkload)]
    assert len(found) == 2 * 2 * 4 * 4
    assert {w.mode for w in found} == set(GDN_MODES)
    assert {w.op for w in found if w.mode == "verify"} == {"gdn_verify"}
    assert all(w.batches == GDN_BATCHES and w.head_dim == 128 for w in found)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_is_frozen_hashable_and_knows_its_name(name: str) -> None:
    w = WORKLOADS[name]
    assert w.name == name and hash(w) == hash(dataclasses.replace(w))
    with pytest.raises(dataclasses.FrozenInstanceError):
        w.name = "other"  # type: ignore[misc]


def test_select_takes_patterns_in_order_and_once() -> None:
    names = [w.name for w in workloads.select(["gdn_hv32_f32_t1_*", "headline", "headline"])]
    assert len(names) == 5 and names[-1] == "headline"


def test_select_names_what_exists() -> None:
    with pytest.raises(ValueError, match=r"'headlin'.*headline"):
        workloads.select(["headlin"])
