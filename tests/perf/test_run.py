"""perf/run.py from its arguments to its lines, on the CPU and on tiny workloads."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path
from typing import Any

import baselines
import ceilings
import moe_case
import pytest
import record
import run
import torch
import workloads
from measure import WallTimer
from workloads import WORKLOADS, GDNWorkload, GemmWorkload, MoEWorkload

import cutemoe

TINY = MoEWorkload("tiny", 64, 32, 8, 2, batches=(1, 3))
TINY_OSS = dataclasses.replace(TINY, name="tiny_oss", **workloads.GPT_OSS)
TINY_FP8 = dataclasses.replace(
    TINY, name="tiny_fp8", hidden=128, intermediate=128, weights="int4", activations="fp8"
)
TINY_NVFP4 = dataclasses.replace(TINY, name="tiny_nvfp4", weights="nvfp4", activations="nvfp4")
TINY_MXFP4 = dataclasses.replace(TINY, name="tiny_mxfp4", activations="mxfp4")
GEMM = GemmWorkload("tiny_gemm", 32, 64, 8, 2, batches=(1, 5))
GEMM_FP8 = dataclasses.replace(
    GEMM, name="tiny_gemm_fp8", k=128, weights="int4", activations="fp8", batches=(3,)
)
GDN = tuple(
    GDNWorkload(f"tiny_{state}_{mode}", 4, 2, 16, state, tokens, mode, (2,))
    for state in ("float32", "bfloat16")
    for mode, tokens in zip(workloads.GDN_MODES, (1, 2, 3, 4), strict=True)
)
ALL = {w.name: w for w in (TINY, TINY_OSS, TINY_FP8, TINY_NVFP4, TINY_MXFP4, GEMM, GEMM_FP8, *GDN)}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command line on tiny workloads; returns the exit code and the records."""
    monkeypatch.setattr(workloads, "WORKLOADS", ALL)
    monkeypatch.setattr(run, "WORKLOADS", ALL)
    monkeypatch.setattr("gdn_case.MAX_SETS", 2)
    monkeypatch.setattr("gdn_case.MIN_CALLS", 3)
    monkeypatch.setattr("moe_case.MAX_CALLS", 2)

    def call(*words: str) -> tuple[int, list[record.Record]]:
        out = tmp_path / "out.jsonl"
        common = ["--device=cpu", f"--out={out}", "--seconds=0", "--commit=abc"]
        code = run.main([*words, *common])
        return code, list(record.read([out])) if out.exists() else []

    return call


@pytest.mark.parametrize("name", ALL)
def test_the_reference_passes_the_gate_and_is_recorded(tiny: Any, name: str) -> None:
    code, records = tiny(f"--workloads={name}", "--backends=reference")
    assert code == 0, records
    assert [r.batch for r in records] == list(ALL[name].batches)
    for r in records:
        assert (r.workload, r.op, r.backend) == (name, ALL[name].op, "reference")
        assert r.error is None and not r.timed, "a host clock is never reported"
        assert r.us_p20 and r.us_p50 and r.us_p80 and r.us_p20 <= r.us_p50 <= r.us_p80
        assert r.floor_us and r.percent_of_floor and r.bound
        assert r.error_vs_fp64 is not None and r.error_vs_fp64 <= r.bound
        assert r.commit == "abc" and r.ceilings["read_tb_s"] > 0 and r.versions["torch"]


def test_a_failure_is_recorded_and_the_rest_goes_on(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = moe_case.prepare

    def fail_once(layer: Any, *rest: Any) -> Any:
        if layer.gate_up == "interleaved":
            raise RuntimeError("boom")
        return prepare(layer, *rest)

    monkeypatch.setattr(moe_case, "prepare", fail_once)
    code, records = tiny("--workloads=tiny_oss,tiny", "--backends=reference")
    assert code == 1
    assert [r.error for r in records] == ["RuntimeError: boom"] * 2 + [None] * 2


def test_a_wrong_kernel_is_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fused_moe = cutemoe.fused_moe

    def wrong(*args: Any, **kwargs: Any) -> torch.Tensor:
        return fused_moe(*args, **kwargs).mul_(1.1)

    monkeypatch.setattr(cutemoe, "fused_moe", wrong)
    code, records = tiny("--workloads=tiny", "--backends=reference", "--batches=3")
    assert code == 1 and len(records) == 1
    assert records[0].error and records[0].error.startswith("Refused: error")


def test_what_does_not_fit_in_the_time_is_skipped(tiny: Any, capsys: Any) -> None:
    code, records = tiny("--workloads=tiny", "--backends=reference", "--time-limit=0")
    assert code == 0 and records == []
    assert "2 skipped" in capsys.readouterr().out


def test_a_back_end_that_is_not_there_is_named(tiny: Any, capsys: Any) -> None:
    code, records = tiny("--workloads=tiny", "--backends=nonsense")
    assert code == 0 and records == []
    assert "fused_moe has no such back end" in capsys.readouterr().out


def test_a_lost_device_is_left_for_a_new_process(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lose(*_: Any) -> None:
        raise run.DeviceLost("gone")

    started: list[list[str]] = []
    monkeypatch.setattr(run, "run_workload", lose)
    monkeypatch.setattr(run.os, "execv", lambda _, command: started.append(command))
    tiny("--workloads=tiny_oss,tiny,tiny_fp8", "--backends=reference", "--batches=2")
    args = run.parser().parse_args(started[0][2:])
    assert args.workloads == ["tiny", "tiny_fp8"] and args.batches == [2]
    assert args.backends == ["reference"] and args.commit == "abc"
    code, _ = tiny("--workloads=tiny")
    assert code == 1


def test_errors_before_a_new_process_count(tiny: Any) -> None:
    code, _ = tiny("--workloads=tiny", "--backends=reference", "--errors-before=1")
    assert code == 1


def test_a_peer_passes_the_same_gate(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    peer: Any = types.SimpleNamespace(
        unavailable=lambda: None,
        prepare_layer=lambda w, layer: moe_case.ours(
            w, moe_case.prepare(layer, "auto", CPU), 8, "auto"
        ),
        run_layer=lambda prepared, x, logits: prepared(x, logits, torch.empty_like(x)),
    )
    monkeypatch.setattr(baselines, "load", lambda name: peer)
    code, records = tiny("--workloads=tiny,tiny_float32_decode", "--backends=peer:fake")
    assert code == 0 and [r.backend for r in records] == ["peer:fake"] * 2


def test_decoded_weights_are_measured_beside_our_own(tiny: Any) -> None:
    peer = "peer:dequantized_moe"
    code, records = tiny("--workloads=tiny_nvfp4", f"--backends=reference,{peer}")
    assert code == 0 and [r.backend for r in records] == ["reference"] * 2 + [peer] * 2
    assert all(r.error is None for r in records)


CPU = torch.device("cpu")


def test_no_gpu_is_said(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        run.main(["--workloads=headline"])
    assert stop.value.code == 2 and "no CUDA device" in capsys.readouterr().err


def test_an_unknown_workload_is_an_argument_error(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        run.main(["--workloads=headlin"])
    assert stop.value.code == 2 and "headline" in capsys.readouterr().err


def test_list_prints_every_workload(capsys: Any) -> None:
    assert run.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in WORKLOADS)


def test_arguments() -> None:
    words = ["--workloads", "headline,gdn_*", "--batches=1,64", "--backends=triton"]
    args = run.parser().parse_args([*words, "--time-limit", "500"])
    assert args.workloads == ["headline", "gdn_*"] and args.batches == [1, 64]
    assert args.backends == ["triton"] and args.time_limit == 500.0


def test_ceilings_are_positive_on_a_stand_in_clock() -> None:
    c = ceilings.measure_ceilings(WallTimer(), CPU, **run.CPU_CEILINGS)
    assert min(c.read_tb_s, c.copy_tb_s, c.bf16_tflop_s, c.node_us) > 0


@pytest.mark.parametrize("name", ["headline", "deepseek_v3", "qwen3_next", "gpt_oss_20b"])
def test_layers_of_a_workload_are_cold_and_fit(name: str) -> None:
    w = WORKLOADS[name]
    assert isinstance(w, MoEWorkload)
    n = moe_case.sets_of(w, w.batches)
    assert n * w.experts * moe_case.expert_bytes(w) <= moe_case.MEMORY
    for b in w.batches:
        read = moe_case.bytes_of_a_call(w, b)
        assert moe_case.calls_of(read, b) * read >= 256 << 20
