"""Cross-compiles CuTe configurations: a JSON request a line, a JSON answer a line.

A request names a family (the folder of its cute_plan and cute_build), an architecture, and the
fields of a Config; a field that holds a dataclass itself is a dict."""

from __future__ import annotations

import contextlib
import importlib
import json
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

    family = f"cutemoe.{request['family']}"
    plan = importlib.import_module(f"{family}.cute_plan")
    build = importlib.import_module(f"{family}.cute_build").build
    fields = _tuples(request["config"])
    if "tile" in fields and isinstance(fields["tile"], dict):
        fields["tile"] = plan.Tile(**fields["tile"])
    start = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        kernel = build(plan.Config(**fields), f"--gpu-arch {request['arch']}")
    seconds = time.perf_counter() - start
    registers, local, sass = _read(bytes(kernel.artifacts.CUBIN))
    return {"registers": registers, "local_bytes": local, "sass": sass, "seconds": seconds}


def _tuples(x: Any) -> Any:
    """JSON's lists as the tuples they were."""
    if isinstance(x, dict):
        return {k: _tuples(v) for k, v in x.items()}
    return tuple(map(_tuples, x)) if isinstance(x, list) else x


if __name__ == "__main__":
    main()
