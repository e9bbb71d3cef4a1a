"""Cross-compiles Triton kernels without a GPU and reads the result: registers, spills, SASS.

The process of the tests runs with TRITON_INTERPRET=1, where `@triton.jit` makes interpreted
functions, so a worker process (worker.py, one per test process, started on first use) compiles.

    from tests.compile.harness import Ref, compile_kernel

    c = compile_kernel(
        "cutemoe.triton_kernels.moe",
        "_fc1",
        signature={"x_ptr": "*bf16", "T": "i32", "stride_xm": "i64"},
        constexprs={"BLOCK_M": 16, "decode": Ref("cutemoe.triton_kernels.decode:mxfp4")},
        arch=90,
    )
    assert c.local_bytes == 0 and c.has_wgmma

Parameters in neither mapping keep their defaults. Pointers count as 16-byte aligned unless
`unaligned` names them; integers are divisible by 16 only where `divisible` names them. Needs no
ptxas, nvcc or driver: Triton's wheel brings ptxas and cuobjdump.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

SMEM_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
TIMEOUT_S = 300


@dataclass(frozen=True)
class Ref:
    """A constexpr that JSON cannot carry: "module:attribute", resolved in the worker."""

    target: str


@dataclass(frozen=True)
class Compiled:
    """What one kernel became on one architecture.

    Attributes:
        registers, local_bytes: per thread; local_bytes counts spills and indexed local arrays.
        shared: bytes of shared memory of a CTA, static and dynamic.
        spills: store instructions to local memory.
        sass: instructions without addresses and encodings, one a line.
    """

    name: str
    arch: int
    num_warps: int
    registers: int
    local_bytes: int
    shared: int
    ptx: str = field(repr=False)
    sass: str = field(repr=False)

    @property
    def spills(self) -> int:
        return self.count(r"STL(\.\S+)?")

    @property
    def has_wgmma(self) -> bool:
        """Warpgroup MMA of Hopper: HGMMA, QGMMA (fp8) or IGMMA in SASS."""
        return self.count(r"[HQI]GMMA\.\S+") > 0

    @property
    def has_mma(self) -> bool:
        """Any tensor core instruction."""
        return self.count(r"(HMMA|QMMA|IMMA|OMMA|HGMMA|QGMMA|IGMMA|UTC\w*MMA)(\.\S+)?") > 0

    def count(self, opcode: str) -> int:
        """How many instructions have an opcode that matches the regular expression whole."""
        pattern = re.compile(rf"(?:@!?U?P\w+ )?(?:{opcode})")
        return sum(bool(pattern.fullmatch(_opcode(line))) for line in self.sass.splitlines())


def compile_kernel(
    module: str,
    function: str,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    arch: int,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    unaligned: tuple[str, ...] = (),
    divisible: tuple[str, ...] = (),
    options: Mapping[str, Any] | None = None,
) -> Compiled:
    """Compiles `module.function`, a @triton.jit kernel, for sm_<arch>.

    Args:
        signature: Triton type of every run-time parameter ("*bf16", "*fp32", "*u8", "*fp8e4nv",
            "i32", "i64", "fp32", ...).
        constexprs: value of every constexpr parameter that has no default, or overrides one.
        arch: 80, 90, 100 or 120.
        options: further compile options, such as enable_fp_fusion.

    Raises:
        RuntimeError: the compiler's traceback.
    """
    request = {
        "module": module,
        "function": function,
        "signature": dict(signature),
        "constexprs": {k: _plain(v) for k, v in constexprs.items()},
        "arch": arch,
        "options": {"num_warps": num_warps, "num_stages": num_stages, **(options or {})},
        "unaligned": list(unaligned),
        "divisible": list(divisible),
    }
    answer = _worker().ask(request)
    if "error" in answer:
        raise RuntimeError(f"{module}.{function} for sm_{arch}: {answer['error']}")
    return Compiled(function, arch, num_warps, **answer)


def _plain(value: Any) -> Any:
    return {"ref": value.target} if isinstance(value, Ref) else value


def _opcode(line: str) -> str:
    words = line.split()
    guard = words[:1] if words[:1] and words[0].startswith("@") else []
    return " ".join(words[: len(guard) + 1])


class _Worker:
    """A process that compiles one request a line; killed when it exceeds TIMEOUT_S."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TRITON_INTERPRET": "0"},
        )
        atexit.register(self.close)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(TIMEOUT_S, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            _worker.cache_clear()
            return {"error": f"the compile worker died or took over {TIMEOUT_S} s"}
        return json.loads(line)

    def close(self) -> None:
        if self._process.poll() is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(timeout=30)


@cache
def _worker() -> _Worker:
    return _Worker()
