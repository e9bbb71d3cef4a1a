"""Cross-compiles CuTe kernels: a JSON request a line, a JSON answer a line.

A request has an arch, a build function ("module:function") and its pickled configuration.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import pickle
import sys
import time
import traceback
import types
from pathlib import Path
from typing import Any


def main() -> None:
    # as in worker.py: `tests` is importable, this folder and the repository root are not
    sys.path.pop(0)
    tests = sys.modules["tests"] = types.ModuleType("tests")
    tests.__path__ = [str(Path(__file__).parents[1])]
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            answer = compiled(json.loads(line))
        except BaseException as e:
            answer = {"error": "".join(traceback.format_exception(e))[-4000:]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def compiled(request: dict[str, Any]) -> dict[str, Any]:
    """Registers, local bytes, SASS and seconds of one configuration."""
    from tests.compile.worker import _read

    module, _, function = request["build"].partition(":")
    build = getattr(importlib.import_module(module), function)
    config = pickle.loads(bytes.fromhex(request["config"]))
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        kernel = build(config, f"--gpu-arch {request['arch']}")
    seconds = time.perf_counter() - start
    registers, local, sass = _read(bytes(kernel.artifacts.CUBIN))
    return {
        "registers": registers,
        "local_bytes": local,
        "sass": sass,
        "seconds": seconds,
        # kept where the environment asks for it
        "ptx": kernel.artifacts.PTX or "",
    }


if __name__ == "__main__":
    main()
