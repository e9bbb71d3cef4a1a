"""On a card: no compiler, a second process that only loads, and nothing compiled while serving."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
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
    with (
        pytest.raises(NotCompiled, match="CUDA graph capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        cutemoe.fused_moe(x, moe, ids, w, activation=swiglu)
    assert build_count() == before
    want = cutemoe.fused_moe(x, moe, ids, w, activation=swiglu)
    graph = torch.cuda.CUDAGraph()
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


def test_launches_cost_less_than_tritons_own() -> None:
    """Microseconds from Python of one kernel of ten arguments; Triton's needs a C compiler.

    How many depends on the host, so torch's own add_ is printed beside them.
    """
    from cutemoe.triton_kernels import launch, sort

    i32 = torch.zeros(64, dtype=torch.int32, device="cuda")
    args = (i32, 2, i32, i32, i32, i32, 8, 2, 0, 8)
    words = {"TILE": 8, "BLOCK": 64, "BINS": 8, "PDL": False, **launch.options(4)}
    ours = us(lambda: sort.sort_slots[(8,)](*args, **words))
    one = torch.zeros(1, device="cuda")
    add = us(lambda: one.add_(1))
    print(f"{ours:.1f} us, torch's add_ {add:.1f} us")
    try:
        theirs = us(lambda: sort.sort_slots.function[(8,)](*args, **words))
    except RuntimeError as e:
        pytest.skip(f"Triton's own launcher: {e}")
    print(f"Triton's own {theirs:.1f} us")
    assert ours <= theirs


def us(call: Any) -> float:
    """Median microseconds of a call that returns at once."""
    found = []
    for _ in range(9):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(200):
            call()
        found.append((time.perf_counter() - start) / 200 * 1e6)
    return statistics.median(found)


def test_a_warm_load_takes_milliseconds(folder: Path) -> None:
    """Look-up, digest and load into the device, of every kernel of a second process."""
    code = (
        "import json, time, contextlib, io\n"
        "from cutemoe.commands import demo\n"
        "from cutemoe.runtime import compile as c\n"
        "from cutemoe.triton_kernels import launch\n"
        "took = []\n"
        "def timed(f):\n"
        "    def call(*a):\n"
        "        start = time.perf_counter(); r = f(*a); took.append(time.perf_counter() - start)\n"
        "        return r\n"
        "    return call\n"
        "kept = launch.kept\n"
        "launch._load, launch.kept = timed(launch._load), timed(kept)\n"
        "c._loaded = timed(c._loaded)\n"
        "with contextlib.redirect_stdout(io.StringIO()):\n"
        "    demo.run(as_json=True)\n"
        "took.sort()\n"
        "print(json.dumps([c.build_count(), len(took), took[int(0.95 * len(took))]]))\n"
    )
    bare(folder, "demo")
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CUTEMOE_CACHE_DIR": str(folder / "kept")},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    built, number, p95 = json.loads(done.stdout.splitlines()[-1])
    assert built == 0 and number > 10 and p95 <= 0.015
