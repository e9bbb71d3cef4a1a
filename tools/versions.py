"""Runs the tests that need no GPU with every combination of versions that is promised to work.

    python tools/versions.py                        all of them, each in an environment of its own
    python tools/versions.py --only oldest --keep   one, and keep its environment
    python tools/versions.py --dsl 4.7.1            compile tests here, with this DSL alone replaced
    python tools/versions.py --neighbours           can pip install us beside these engines?

Needs an index with CPU builds of torch: name it with --torch-index where pip's own has none.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
# "" is the newest that pip finds
SETS = {
    "oldest": {"torch": "==2.10.0", "triton": "==3.6.0", "nvidia-cutlass-dsl": "==4.7.1"},
    "middle": {"torch": "==2.11.0", "triton": "==3.6.0", "nvidia-cutlass-dsl": "==4.8.0"},
    "triton 3.6": {"torch": "", "triton": "==3.6.0", "nvidia-cutlass-dsl": "==4.8.1"},
    "newest": {"torch": "", "triton": "", "nvidia-cutlass-dsl": ""},
}
NEIGHBOURS = ("vllm", "sglang")
# one thread of torch for each worker of pytest
AS_CI = {"CI": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
TESTS = ("-q", "-m", "not gpu", "-p", "no:cacheprovider", "tests")
DSL = ("nvidia-cutlass-dsl", *(f"nvidia-cutlass-dsl-libs-{n}" for n in ("base", "core", "cu13")))
COMPILE_TESTS = (*TESTS[:-1], "tests/compile")


def main() -> int:
    """Runs what the arguments name; 1 if anything failed."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("--only", action="append", choices=SETS, help="one set of versions")
    p.add_argument("--folder", help="where environments are made; by default a temporary folder")
    p.add_argument("--keep", action="store_true", help="leave them there")
    p.add_argument("--torch-index", help="index of CPU builds of torch")
    p.add_argument("--neighbours", action="store_true", help="resolve beside engines, run nothing")
    p.add_argument("--dsl", metavar="VERSION", help="replace the DSL, run the compile tests")
    p.add_argument("tests", nargs="*", help="arguments of pytest, after --")
    args = p.parse_args()
    if args.neighbours:
        return max(resolved(name) for name in NEIGHBOURS)
    if args.dsl:
        return compiled(args.dsl, args.folder, args.tests or COMPILE_TESTS)
    outcomes = {}
    made = args.folder or tempfile.mkdtemp(prefix="cutemoe-versions-")
    for name in args.only or SETS:
        start, folder = time.perf_counter(), Path(made) / name.replace(" ", "-")
        code = tested(SETS[name], folder, args.torch_index, args.tests or list(TESTS))
        seconds = time.perf_counter() - start
        outcomes[name] = f"{f'FAILED ({code})' if code else 'ok'}, {seconds:.0f} s"
        if not args.keep:
            shutil.rmtree(folder)
    for name, outcome in outcomes.items():
        print(f"{name:12} {outcome}")
    return int(any("FAILED" in o for o in outcomes.values()))


def tested(versions: dict[str, str], folder: Path, index: str | None, tests: list[str]) -> int:
    """Exit code of the tests in a fresh environment with these versions."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q"]
    torch, triton, dsl = (name + v for name, v in versions.items())
    steps = (
        [*pip, torch, *(["--index-url", index] if index else [])],
        [*pip, torch, dsl, "-e", f"{ROOT}[test,hf,perf]"],
        # a CUDA build of torch asks for one triton; the tests say what others do
        [*pip, "--no-deps", triton],
        [python, "-m", "pytest", *tests],
    )
    for step in steps:
        code = subprocess.run(step, cwd=ROOT, env={**os.environ, **AS_CI}).returncode
        if code:
            return code
    return 0


def compiled(version: str, folder: str | None, tests: Sequence[str]) -> int:
    """Exit code of tests in this environment, with one release of the DSL before its own."""
    with tempfile.TemporaryDirectory(prefix="cutemoe-dsl-") as fresh:
        made = Path(folder or fresh).resolve()
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(made)]
        code = subprocess.run([*pip, *(f"{name}=={version}" for name in DSL)]).returncode
        paths = (made, made / "nvidia_cutlass_dsl" / "dsl_packages", ROOT)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        return code or subprocess.run([sys.executable, "-m", "pytest", *tests], cwd=ROOT,
                                      env=env).returncode  # fmt: skip


def resolved(neighbour: str) -> int:
    """0 if pip finds versions for us and a neighbour together; installs nothing."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--dry-run", "--ignore-installed"]
    code = subprocess.run([*command, str(ROOT), neighbour]).returncode
    print(f"{neighbour}: {'resolves' if code == 0 else 'does not resolve'} beside us")
    return int(code != 0)


if __name__ == "__main__":
    sys.exit(main())
