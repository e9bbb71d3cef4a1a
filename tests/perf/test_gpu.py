"""perf/run.py on a GPU: graphs, rotation and the gate, on workloads that take a moment."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import record
import run
import workloads
from workloads import GDNWorkload, GemmWorkload, MoEWorkload

TINY = MoEWorkload("tiny", 512, 256, 16, 4, batches=(1, 64))
ALL = {
    w.name: w
    for w in (
        TINY,
        dataclasses.replace(TINY, name="tiny_oss", **workloads.GPT_OSS),
        dataclasses.replace(TINY, name="tiny_w4a8", weights="int4", activations="fp8"),
        dataclasses.replace(TINY, name="tiny_w4a4", weights="nvfp4", activations="nvfp4"),
        dataclasses.replace(TINY, name="tiny_mxfp4_w4a4", activations="mxfp4"),
        GemmWorkload("tiny_gemm", 256, 512, 16, 4, batches=(4,)),
        GemmWorkload("tiny_gemm_fp8", 256, 512, 16, 4, "int4", None, "fp8", (4,)),
        *(
            GDNWorkload(f"tiny_{state}_{mode}", 8, 4, 128, state, 4, mode, (1, 8))
            for state in ("float32", "bfloat16")
            for mode in workloads.GDN_MODES
        ),
    )
}


@pytest.mark.gpu
def test_every_back_end_is_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workloads, "WORKLOADS", ALL)
    monkeypatch.setattr(run, "WORKLOADS", ALL)
    out = tmp_path / "out.jsonl"
    code = run.main(["--workloads=*", f"--out={out}", "--seconds=0.05", "--commit=test"])
    records = list(record.read([out]))
    assert code == 0, [r.error for r in records if r.error]
    measured = {r.workload for r in records}
    assert measured == set(ALL)
    for r in records:
        assert r.timed and r.us_p50 and 0.5 < r.us_p50 < 1e5
        assert r.ceilings["read_tb_s"] > 0.1 and r.ceilings["bf16_tflop_s"] > 10
        assert r.clocks and r.versions["cuda"]
