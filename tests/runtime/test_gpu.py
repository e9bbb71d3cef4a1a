"""On a card: no compiler, a second process that only loads, and nothing compiled while serving."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import cutemoe
from cutemoe.runtime.compile import NotCompiled, build_count, no_jit

pytestmark = pytest.mark.gpu
TIMEOUT_S = 300


def bare(folder: Path, *words: str, **more: str) -> dict[str, Any]:
    """The json a command prints where no program can be found: PATH is empty, CC names nothing."""
    done = subprocess.run(
        [sys.executable, "-m", "cutemoe", *words, "--json"],
        env={
            **os.environ,
            "PATH": "",
            "CC": "no-such-compiler",
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "CUTEMOE_CACHE_DIR": str(folder / "kept"),
            **more,
        },
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    return tmp_path_factory.mktemp("kernels")


def test_the_demo_needs_no_compiler_and_the_second_compiles_nothing(folder: Path) -> None:
    first = bare(folder, "demo")
    assert first["ok"] and first["kernels"]["compiled"] > 10
    assert {"cute", "triton"} <= {row["backend"] for row in first["rows"]}
    second = bare(folder, "demo", CUTEMOE_NO_JIT="1")
    assert second["ok"] and second["kernels"]["compiled"] == 0
    assert second["kernels"]["loaded"] >= first["kernels"]["compiled"]
    assert second["kernels"]["load_seconds"] < 2.0
    print(json.dumps([first["kernels"], second["kernels"]]))


SERVE = """
import json, random, torch, cutemoe
from cutemoe.runtime.compile import build_count, load_count
H, I, E, K = 2880, 2880, 32, 4
data = lambda n, k: torch.randint(0, 255, (E, n, k // 2), dtype=torch.uint8, device="cuda")
scale = lambda n, k: torch.full((E, n, k // 32), 120, dtype=torch.uint8, device="cuda")
q = lambda n, k: cutemoe.QuantizedTensor(data(n, k), scale(n, k), format="mxfp4")
b = lambda n: torch.zeros(E, n, device="cuda")
moe = cutemoe.prepare_moe(q(2 * I, H), q(H, I), b(2 * I), b(H), gate_up="interleaved")
act = cutemoe.SwiGLU(alpha=1.702, beta=1.0, limit=7.0)
draw = random.Random(0)
for _ in range(1000):
    T = draw.choice((1, 2, 3, 5, 8, 13, 33, 64, 65, 127, 250, 511, 1000, 2049, 4096))
    T = min(4096, T + draw.randrange(3))
    x = torch.randn(T, H, dtype=torch.bfloat16, device="cuda")
    ids, w = cutemoe.route(torch.randn(T, E, device="cuda"), K, method="topk_softmax")
    y = cutemoe.fused_moe(x, moe, ids, w, activation=act)
torch.cuda.synchronize()
print(json.dumps([build_count(), load_count(), bool(torch.isfinite(y).all())]))
"""


def test_after_compile_a_thousand_calls_compile_nothing(folder: Path) -> None:
    """The real layer of the preset, in a process that may not compile."""
    made = bare(folder, "compile", "--preset", "gpt-oss-20b")
    assert made["ok"] and made["kernels"]
    done = subprocess.run(
        [sys.executable, "-c", SERVE],
        env={**os.environ, "CUTEMOE_NO_JIT": "1", "CUTEMOE_CACHE_DIR": str(folder / "kept")},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    built, loaded, finite = json.loads(done.stdout)
    assert built == 0 and loaded >= 15 and finite


def layer(hidden: int = 64) -> tuple[Any, ...]:
    w13 = cutemoe.quantize(torch.randn(4, 2 * hidden, hidden, device="cuda"), "mxfp4")
    w2 = cutemoe.quantize(torch.randn(4, hidden, hidden, device="cuda"), "mxfp4")
    moe = cutemoe.prepare_moe(w13, w2)
    x = torch.randn(5, hidden, dtype=torch.bfloat16, device="cuda")
    ids, w = cutemoe.route(torch.randn(5, 4, device="cuda"), 2)
    return x, moe, ids, w


def test_a_graph_capture_compiles_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    """The error comes before anything is launched, and names what to do."""
    x, moe, ids, w = layer(96)
    monkeypatch.setenv("CUTEMOE_CACHE_DIR", str(tmp_path))
    swiglu = cutemoe.SwiGLU(alpha=torch.ones(4, device="cuda"), limit=5.0)
    before = build_count()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(NotCompiled, match="CUDA graph capture"), torch.cuda.graph(graph):
        cutemoe.fused_moe(x, moe, ids, w, activation=swiglu)
    assert build_count() == before
    want = cutemoe.fused_moe(x, moe, ids, w, activation=swiglu)
    with torch.cuda.graph(graph), no_jit():
        got = cutemoe.fused_moe(x, moe, ids, w, activation=swiglu)
    graph.replay()
    assert torch.equal(got, want)


def test_launches_follow_the_stream_and_the_thread() -> None:
    """A side stream waits for its own work only, and a new thread has no context yet."""
    import threading

    x, moe, ids, w = layer()
    want = cutemoe.fused_moe(x, moe, ids, w)
    stream, found = torch.cuda.Stream(), []

    def work() -> None:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            y = x * 1
            found.append(cutemoe.fused_moe(y, moe, ids, w))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not stream.query()
    stream.synchronize()
    assert torch.equal(found[0], want)
