"""`cutemoe compile` and `cutemoe cache`: arguments, outcomes, and a job compiled for real."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cutemoe import __main__
from cutemoe.commands import compile as command
from cutemoe.commands import prepare, workers
from cutemoe.commands.prepare import Job
from cutemoe.runtime.cache import Cache
from cutemoe.runtime.preset import PRESETS
from tests.runtime.objects import cubin


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this process keeps kernels."""
    monkeypatch.setenv("CUTEMOE_CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arch", "sm_75", "--preset", "headline"], "arch: expected one of sm_80"),
        (["--arch", "sm_90a", "--preset", "gpt-5"], "preset: expected one of headline"),
        (["--arch", "sm_90a", "--preset", "headline", "--cache-dir", ""], "cache-dir: expected"),
    ],
)
def test_bad_arguments_say_what_is_known(
    words: list[str], said: str, folder: Path, capsys: Any
) -> None:
    assert __main__.main(["compile", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a card is the architecture")
def test_an_architecture_is_needed_without_a_gpu(folder: Path, capsys: Any) -> None:
    assert __main__.main(["compile", "--preset", "headline"]) == 2
    assert "--arch sm_90a" in capsys.readouterr().err


@pytest.mark.parametrize("preset", PRESETS)
def test_jobs_cover_every_format_and_batch(preset: str) -> None:
    jobs = prepare.jobs(preset)
    assert len(set(jobs)) == len(jobs) and len({str(j) for j in jobs}) == len(jobs)
    layer, heads = PRESETS[preset].layer, PRESETS[preset].heads
    kinds = {(j.kind, j.index) for j in jobs}
    assert len({i for kind, i in kinds if kind == "layer"}) == len(layer.formats if layer else ())
    assert ("heads" in {kind for kind, _ in kinds}) == (heads is not None)


def test_parts_are_all_batches() -> None:
    sizes = prepare.batches()
    assert sizes[0] == 1 and sizes[-1] == prepare.MOST
    assert all(sum(a <= n <= b for a, b in prepare.PARTS) == 1 for n in sizes)


def test_a_job_is_compiled_once_and_then_found(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    """For another architecture than this machine's, in worker processes."""
    pytest.importorskip("triton")
    job = Job("gpt-oss-20b", "layer", 0, 3)
    monkeypatch.setattr(command, "jobs", lambda name: [job])
    words = ["compile", "--arch", "sm_90a", "--preset", "gpt-oss-20b", "--json"]
    assert __main__.main(words) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["ok"] and len(first["kernels"]) >= 5
    assert all(k["built"] for k in first["kernels"].values())
    assert __main__.main(words[:-1]) == 0
    shown = capsys.readouterr().out
    assert f"{len(first['kernels'])} kernels" in shown and "place_chunks" in shown
    assert __main__.main(words) == 0
    second = json.loads(capsys.readouterr().out)
    assert set(second["kernels"]) == set(first["kernels"]) == set(Cache(folder).names())
    assert not any(k["built"] for k in second["kernels"].values())


def test_a_job_that_fails_is_told(folder: Path, monkeypatch: Any, capsys: Any) -> None:
    jobs = [Job("gpt-oss-20b", "heads", 0, 0)]
    monkeypatch.setattr(command, "jobs", lambda name: jobs)
    # a preset without heads: the worker answers with the error
    monkeypatch.setattr(Job, "__str__", lambda self: "the job")
    assert __main__.main(["compile", "--arch", "sm_90a", "--preset", "gpt-oss-20b"]) == 1
    out, err = capsys.readouterr()
    assert "FAIL" in out and "the job: InvalidCall" in out and "FAILED" in err


def test_a_worker_that_dies_is_told(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(workers.sys, "executable", "/bin/false")
    (done,) = workers.compiled([Job("headline", "layer", 0, 0)], "sm_90a", 1, lambda *_: None)
    assert "ended with code 1" in done.error


def filled(folder: Path) -> Cache:
    kept = Cache(folder)
    assert kept.trouble() is None
    for i in range(3):
        manifest = {"arch": "sm_90a", "parts": ["triton 3.6.0"], "kernel": f"k{i}", "seconds": i}
        kept.put(f"{i}" * 64, cubin(90, seed=i), manifest)
    return kept


def test_the_cache_is_listed_verified_and_cleared(folder: Path, capsys: Any) -> None:
    kept = filled(folder)
    assert __main__.main(["cache"]) == 0
    assert "3 kernels" in capsys.readouterr().out
    assert __main__.main(["cache", "verify", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)["entries"]
    assert [e["kernel"] for e in entries] == ["k0", "k1", "k2"]
    assert entries[0]["versions"] == "triton 3.6.0"
    (folder / f"{'1' * 64}.bin").write_bytes(b"x")
    assert __main__.main(["cache", "list"]) == 0
    assert __main__.main(["cache", "verify"]) == 1
    assert "its object is not what was written" in capsys.readouterr().out
    assert __main__.main(["cache", "clear"]) == 0
    assert kept.names() == []


def test_a_folder_that_is_not_safe_is_an_error(folder: Path, capsys: Any) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    assert __main__.main(["cache"]) == 1
    assert "chmod 700" in capsys.readouterr().err
    assert __main__.main(["compile", "--arch", "sm_90a", "--preset", "headline"]) == 2
