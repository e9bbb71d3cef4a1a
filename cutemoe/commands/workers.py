"""Processes that compile: each sees no GPU and takes a job a line.

A job is a frozen dataclass of plain values with a method `run`, which makes its calls inside
`compile_only`. What one worker is compiling, another waits for and then loads.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cutemoe.runtime import settings


@dataclass(frozen=True)
class Done:
    """A job that ended: its kernels by key (kernel, built, seconds, nbytes), or what went wrong."""

    job: Any
    seconds: float
    kernels: dict[str, dict[str, Any]]
    error: str = ""


class Progress:
    """A line a job, and on a terminal a bar."""

    def __init__(self, speaks: bool) -> None:
        self.speaks, self.terminal = speaks, sys.stderr.isatty()

    def __call__(self, done: Done, count: int, total: int) -> None:
        """After the `count`th job of `total`."""
        if not self.speaks:
            return
        built = sum(k["built"] for k in done.kernels.values())
        state = f"FAILED: {done.error}" if done.error else f"{built} compiled"
        line = f"[{count}/{total}] {done.job}: {len(done.kernels)} kernels, {state}"
        line += f", {done.seconds:.1f} s"
        full = 30 * count // total
        bar = f"\r\033[K{'#' * full}{'.' * (30 - full)} {count}/{total}" if self.terminal else ""
        clear = "\r\033[K" if self.terminal else ""
        end = "\n" if self.terminal and count == total else ""
        print(f"{clear}{line}\n{bar}", end=end, file=sys.stderr, flush=True)


def compiled(wanted: Sequence[Any], arch: str, workers: int, progress: Any) -> list[Done]:
    """Every job's outcome, from that many processes."""
    waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for job in wanted:
        waiting.put(job)
    done: list[Done] = []
    lock = threading.Lock()

    def work() -> None:
        worker = _Worker(arch)
        try:
            while True:
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    return
                outcome = worker.ask(job)
                with lock:
                    done.append(outcome)
                    progress(outcome, len(done), len(wanted))
        finally:
            worker.close()

    threads = [threading.Thread(target=work) for _ in range(min(workers, len(wanted)))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    return done


class _Worker:
    """A process that compiles; started again after one that died."""

    def __init__(self, arch: str) -> None:
        self.arch, self.process = arch, self._started(arch)

    @staticmethod
    def _started(arch: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "cutemoe.commands.compile_worker", arch],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=settings.worker_environment(arch),
        )

    def ask(self, job: Any) -> Done:
        """Compiles a job."""
        start, stdin, stdout = time.perf_counter(), self.process.stdin, self.process.stdout
        line = ""
        if stdin is not None and stdout is not None:
            try:
                kind = f"{type(job).__module__}:{type(job).__qualname__}"
                stdin.write(json.dumps([kind, asdict(job)]) + "\n")
                stdin.flush()
                line = stdout.readline()
            except BrokenPipeError:
                pass
        seconds = time.perf_counter() - start
        if not line:
            code = self.process.wait()
            self.process = self._started(self.arch)
            return Done(job, seconds, {}, f"the worker ended with code {code}")
        answer = json.loads(line)
        return Done(job, seconds, answer["kernels"], answer.get("error", ""))

    def close(self) -> None:
        """Ends the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()
