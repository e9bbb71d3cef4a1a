"""Asks another process to cross-compile CuTe kernels."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any


class Worker:
    """A process that compiles; the tests' own has Triton's interpreter switched on."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("cute_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # an architecture for the import; every build names its own
            env={
                **os.environ,
                "CUTE_DSL_KEEP": "ptx,cubin",
                "CUTE_DSL_DUMP_DIR": tempfile.mkdtemp(prefix="cutemoe-cubin-"),
                "CUTE_DSL_ARCH": "sm_90a",
            },
        )

    def ask(self, build: str, config: Any, arch: str) -> dict[str, Any]:
        """Registers, local bytes, SASS, PTX and seconds of what build ("module:function") makes."""
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {"build": build, "config": pickle.dumps(config).hex(), "arch": arch}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline() or '{"error": "the worker died"}')
        if "error" in answer:
            raise RuntimeError(f"{config} for {arch}: {answer['error']}")
        return answer


@cache
def worker() -> Worker:
    return Worker()
