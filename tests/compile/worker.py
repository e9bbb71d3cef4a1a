"""The compile worker of harness.py: a JSON request a line on stdin, a JSON answer a line."""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import subprocess
import sys
import tempfile
import traceback
import types
from pathlib import Path
from typing import Any


def main() -> None:
    # as in conftest.py: `tests` is importable, this folder and the repository root are not
    sys.path.pop(0)
    tests = sys.modules["tests"] = types.ModuleType("tests")
    tests.__path__ = [str(Path(__file__).parents[1])]
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            answer = compiled(json.loads(line))
        except BaseException as e:
            detail = "".join(traceback.format_exception(e))
            answer = {"error": detail[-4000:]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def compiled(request: dict[str, Any]) -> dict[str, Any]:
    """Compiles one request; the fields of harness.Compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(request["module"]), request["function"])
    kernel = getattr(kernel, "function", kernel)
    constexprs = {k: _value(v) for k, v in request["constexprs"].items()}
    signature, attrs = {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in request["signature"]:
            kind = signature[name] = request["signature"][name]
            aligned = kind.startswith("*") and name not in request["unaligned"]
            if aligned or name in request["divisible"]:
                attrs[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            if name not in constexprs:
                if parameter.default is parameter._param.empty:
                    raise TypeError(f"no type and no value for parameter {name!r}")
                constexprs[name] = parameter.default
    known = {p.name for p in kernel.params}
    unknown = {n for part in ("signature", "constexprs") for n in request[part]} - known
    if unknown:
        raise TypeError(f"no such parameters: {sorted(unknown)}")
    target = GPUTarget("cuda", request["arch"], 32)
    with contextlib.redirect_stdout(sys.stderr):
        c = triton.compile(
            ASTSource(kernel, signature, constexprs, attrs),
            target=target,
            options=request["options"],
        )
    registers, local, sass = _read(c.asm["cubin"])
    return {
        "registers": registers,
        "local_bytes": local,
        "shared": c.metadata.shared,
        "ptx": c.asm["ptx"],
        "sass": sass,
    }


def _value(v: Any) -> Any:
    if isinstance(v, dict):
        module, _, name = v["ref"].partition(":")
        return getattr(importlib.import_module(module), name)
    return v


def _read(cubin: bytes) -> tuple[int, int, str]:
    """Registers, local bytes and instructions of a cubin, by the cuobjdump of Triton's wheel."""
    import triton

    assert triton.__file__ is not None
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, sass = (
            subprocess.run([tool, flag, path], check=True, capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump says nothing of registers: {usage}")
    registers, stack, local = map(int, found.groups())
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", sass, re.MULTILINE)
    return registers, stack + local, "\n".join(code)


if __name__ == "__main__":
    main()
