"""doctor on this machine and on imagined ones."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import cutemoe
from cutemoe.commands import doctor, machine
from cutemoe.commands.doctor import Finding
from cutemoe.commands.matrix import FAIL, OK, WARN
from cutemoe.runtime.cache import Cache
from tests.runtime.objects import cubin

LEVELS = {OK, WARN, FAIL}


def test_this_machine(capsys: Any) -> None:
    code = doctor.run(as_json=True)
    report = json.loads(capsys.readouterr().out)
    findings = report["findings"]
    assert {f["level"] for f in findings} <= LEVELS
    assert report["ok"] == (code == 0) == all(f["level"] != FAIL for f in findings)
    subjects = {f["subject"] for f in findings}
    assert {"python", "torch", "triton", "kernel cache", "fused_moe", "gdn_verify"} <= subjects
    assert "smoke test, reference" in subjects
    reference = next(f for f in findings if f["subject"] == "smoke test, reference")
    assert reference["level"] == OK


def test_the_table_has_a_line_a_finding(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [Finding(OK, "a", "fine"), Finding(WARN, "b", "so so"), Finding(FAIL, "c", "bad")]
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter(found),))
    assert doctor.run() == 1
    out = capsys.readouterr().out
    assert "FAIL  c" in out and "3 findings, 1 WARN, 1 FAIL" in out
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter(found[:2]),))
    assert doctor.run() == 0


def test_a_check_that_raises_is_a_failure() -> None:
    def broken_check() -> Any:
        yield Finding(OK, "a", "fine")
        raise RuntimeError("boom")

    assert list(doctor.guarded(broken_check)) == [
        Finding(OK, "a", "fine"),
        Finding(FAIL, "broken check", "RuntimeError: boom"),
    ]


def levels(findings: Any) -> dict[str, str]:
    return {f.subject: f.level for f in findings}


def test_versions_missing_old_and_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    here = {"python": "3.9.1", "torch": "2.13.0", "nvidia-cutlass-dsl": "4.6.1"}
    monkeypatch.setattr(machine, "installed", here.get)
    assert levels(doctor.versions()) == {
        "python": FAIL,
        "torch": OK,
        "triton": WARN,
        "nvidia-cutlass-dsl": FAIL,
        "apache-tvm-ffi": WARN,
    }


@pytest.mark.parametrize(
    ("numpy", "triton", "level"),
    [
        ("2.3.5", "3.6.0", OK),
        ("2.5.2", "3.6.0", FAIL),
        ("2.5.2", "3.9.0", WARN),
        (None, "3.6.0", FAIL),
    ],
)
def test_numpy_counts_where_the_interpreter_is_on(
    numpy: str | None, triton: str, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {"python": "3.11.7", "torch": "2.13.0", "triton": triton, "numpy": numpy}
    monkeypatch.setattr(machine, "installed", here.get)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert levels(doctor.versions())["numpy"] == level
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "numpy" not in levels(doctor.versions())


def test_dsl_parts_of_different_versions_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"nvidia-cutlass-dsl": "4.8.1", "nvidia-cutlass-dsl-libs-cu13": "4.7.1"}
    monkeypatch.setattr(machine, "dsl_parts", lambda: parts)
    (finding,) = doctor.cute_dsl()
    assert finding.level == FAIL and "4.7.1" in finding.text


def test_a_dsl_that_does_not_import_is_a_warning_while_nothing_uses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> str:
        raise ImportError("libcute")

    monkeypatch.setattr(machine, "dsl_parts", lambda: {"nvidia-cutlass-dsl": "4.8.1"})
    monkeypatch.setattr(machine, "dsl_flavour", broken)
    (finding,) = doctor.cute_dsl()
    names = {b.name for op in doctor.OPS for b in cutemoe.backends(op, "cpu")}
    assert finding.level == (FAIL if "cute" in names else WARN) and "libcute" in finding.text
    monkeypatch.setattr(machine, "dsl_parts", dict)
    assert list(doctor.cute_dsl()) == []


def gpu(major: int, minor: int) -> Any:
    name = f"card {major}.{minor}"
    return types.SimpleNamespace(major=major, minor=minor, name=name, total_memory=2**37)


def test_no_gpu_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "driver_api", lambda: None)
    (finding,) = doctor.gpu()
    assert finding.level == OK and "CPU" in finding.text


def test_gpus_by_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "driver_api", lambda: "13.0")
    monkeypatch.setattr(machine, "driver", lambda: "580.1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine, "gpus", lambda: [gpu(9, 0), gpu(7, 5), gpu(12, 0)])
    assert levels(doctor.gpu()) == {"driver": OK, "GPU 0": OK, "GPU 1": WARN, "GPU 2": WARN}
    monkeypatch.setattr(machine, "gpus", list)
    assert levels(doctor.gpu())["GPU"] == WARN
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU build" in list(doctor.gpu())[-1].text


def test_the_folder_of_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUTEMOE_NO_JIT", raising=False)

    def finding() -> Finding:
        (found,) = doctor.kernel_cache()
        return found

    monkeypatch.setenv("CUTEMOE_CACHE_DIR", "")
    assert finding().level == WARN and "is empty" in finding().text
    monkeypatch.setenv("CUTEMOE_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    assert finding().level == OK and "0 kernels" in finding().text
    kept = Cache(tmp_path)
    manifest = {"arch": "sm_90a", "parts": [], "kernel": "k", "seconds": 1.0}
    kept.put("ab" * 32, cubin(90), manifest)
    assert finding().level == OK and "1 kernels" in finding().text
    (tmp_path / f"{'ab' * 32}.bin").write_bytes(b"")
    assert finding().level == WARN and "1 broken" in finding().text
    tmp_path.chmod(0o777)
    assert finding().level == WARN and "chmod 700" in finding().text
    monkeypatch.setenv("CUTEMOE_NO_JIT", "1")
    assert levels(doctor.kernel_cache())["CUTEMOE_NO_JIT"] == OK


def test_a_wrong_back_end_fails_the_smoke_test(monkeypatch: pytest.MonkeyPatch) -> None:
    real = cutemoe.grouped_gemm
    monkeypatch.setattr(cutemoe, "grouped_gemm", lambda *a, **k: real(*a, **k).add_(1))
    assert set(levels(doctor.smoke()).values()) == {FAIL}


def test_a_back_end_that_raises_fails_the_smoke_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("boom")

    monkeypatch.setattr(cutemoe, "grouped_gemm", broken)
    assert all(f.level == FAIL and "boom" in f.text for f in doctor.smoke())


def test_a_forced_back_end_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUTEMOE_BACKEND", "reference")
    assert levels(doctor.back_ends())["CUTEMOE_BACKEND"] == WARN
