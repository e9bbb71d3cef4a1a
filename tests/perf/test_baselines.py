"""Peers without their packages: nothing is imported, and each says what it lacks or refuses."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import baselines
import pytest
import torch
from baselines import openai_triton_kernels as tk
from workloads import WORKLOADS, GDNWorkload, MoEWorkload

import cutemoe
from cutemoe.commands import oracle

PACKAGES = {
    "peer:openai_triton_kernels": "triton_kernels",
    "peer:fla": "fla",
    "peer:flashinfer": "flashinfer",
    "peer:vllm_nvfp4_emulation": "vllm",
}
MOE = {n: w for n, w in WORKLOADS.items() if isinstance(w, MoEWorkload)}
GDN = {n: w for n, w in WORKLOADS.items() if isinstance(w, GDNWorkload)}


def test_every_peer_has_a_package_or_is_our_own() -> None:
    assert set(baselines.names()) == {*PACKAGES, "peer:dequantized_moe"}


def test_loading_and_asking_imports_no_package() -> None:
    perf = Path(baselines.__file__).parents[1]
    script = (
        f"import sys; sys.path.insert(0, {str(perf)!r})\n"
        "import baselines\n"
        "for name in baselines.names(): baselines.load(name).unavailable()\n"
        f"print(sorted(set({list(PACKAGES.values())}) & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("name", "package"), PACKAGES.items())
def test_without_its_package_a_peer_says_how_to_install_it(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines.importlib.util, "find_spec", lambda _: None)
    why = baselines.reason(name, "fused_moe", WORKLOADS["headline"])
    assert why is not None
    assert why.startswith(f"{package} is not installed; pip install ")


def test_another_package_of_the_name_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "triton_kernels"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    why = tk.unavailable()
    assert why is not None and f"found at {folder} has no matmul_ogs.py" in why
    (folder / "matmul_ogs.py").touch()
    assert tk.unavailable() is None


def refused(name: str, workloads: dict[str, MoEWorkload] | dict[str, GDNWorkload]) -> set[str]:
    refuse = baselines.load(name).refuse
    return {n for n, w in workloads.items() if refuse(w) is not None}


def test_triton_kernels_refuses_other_formats() -> None:
    other = {n for n, w in MOE.items() if (w.weights, w.activations) != ("mxfp4", "bf16")}
    assert other and refused("peer:openai_triton_kernels", MOE) == other
    clamped = dataclasses.replace(MOE["headline"], swiglu=(1.0, 0.0, 7.0))
    assert "beta 1, got 0.0" in (tk.refuse(clamped) or "")
    assert tk.own_routing(MOE["gpt_oss_120b"])
    assert not tk.own_routing(MOE["headline"]) and not tk.own_routing(MOE["deepseek_v3"])


def test_gdn_peers_refuse_what_they_do_not_write() -> None:
    assert refused("peer:fla", GDN) == {n for n, w in GDN.items() if w.mode != "decode"}
    left = set(GDN) - refused("peer:flashinfer", GDN)
    assert "gdn_hv32_f32_t1_decode" in left and "gdn_hv64_bf16_t8_snapshots" in left
    assert "gdn_hv32_f32_t4_snapshots+update" in left
    assert "gdn_hv32_bf16_t4_snapshots+update" not in left
    assert "gdn_hv32_f32_t1_snapshots" not in left
    small = dataclasses.replace(GDN["gdn_hv32_f32_t1_decode"], head_dim=64)
    assert "128, got 64" in (baselines.load("peer:flashinfer").refuse(small) or "")


@pytest.mark.parametrize("op", ["gdn_verify", "grouped_gemm"])
def test_an_op_that_no_peer_has_is_named(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in baselines.names():
        monkeypatch.setattr(baselines.load(name), "unavailable", lambda: None)
        assert baselines.reason(name, op, None) == f"does not run {op}"


@pytest.mark.parametrize("order", ["gate_up", "up_gate", "interleaved"])
@pytest.mark.parametrize("beta", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_and_bias_give_the_unit_of_triton_kernels_what_the_layer_asks(
    order: str, beta: float, biased: bool
) -> None:
    """Gate first in turns, times up + 1, is the layer's product in every order of its rows."""
    e, wide, k = 3, 8, 32
    g = torch.Generator().manual_seed(7)
    # integers and quarters: every sum is exact, the bias with beta in it too
    x = torch.randint(-8, 9, (5, k), generator=g).float()
    dense = torch.randn(e, wide, k, generator=g)
    w13 = cutemoe.quantize(dense, "mxfp4")
    b13 = torch.randint(-9, 10, (e, wide), generator=g) / 4 if biased else None
    layer = oracle.Layer(w13, w13, b13, None, order, "bf16", (1.7, beta, None))
    rows = tk.interleaved(w13.dequantize(), order)
    bias = tk.bias13(layer)
    assert (bias is None) == (not biased and beta == 1.0)
    for expert in range(e):
        h = x.double() @ rows[expert].double().T
        h = h if bias is None else h + bias[expert].double()
        got = oracle.swiglu(h[:, 0::2], h[:, 1::2], 1.7, 1.0, None)
        stored = x.double() @ w13.dequantize()[expert].double().T
        stored = stored if b13 is None else stored + b13[expert].double()
        want = oracle.swiglu(*oracle.halves(stored, order), 1.7, beta, None)
        assert torch.equal(got, want)
