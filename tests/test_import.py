"""`import cutemoe` is light: no compiler, no CUDA context, milliseconds."""

import importlib
import json
import subprocess
import sys

import pytest

import cutemoe

HEAVY = ("triton", "cutlass", "cuda", "tvm_ffi", "transformers", "matplotlib")
LIMIT_MS = 50


def in_fresh_process(code: str, cwd=None) -> str:
    """Standard output of a new interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(code: str, cwd) -> list[str]:
    """Modules that code loads beyond torch; asserts that no CUDA context started."""
    lines = (
        "import json, sys, torch",
        "before = set(sys.modules)",
        code,
        "print(json.dumps([sorted(set(sys.modules) - before), torch.cuda.is_initialized()]))",
    )
    new, started = json.loads(in_fresh_process("\n".join(lines), cwd))
    assert not started
    return new


def test_it_loads_its_errors_and_nothing_else(tmp_path):
    new = loaded("import cutemoe", tmp_path)
    assert [m for m in new if m.startswith(("cutemoe", *HEAVY))] == ["cutemoe", "cutemoe.errors"]


def test_every_name_loads_no_compiler_either(tmp_path):
    new = loaded("import cutemoe\n[getattr(cutemoe, n) for n in cutemoe.__all__]", tmp_path)
    assert "cutemoe.moe.api" in new
    assert [m for m in new if m.split(".")[0] in HEAVY] == []


def test_it_takes_milliseconds_beyond_torch(tmp_path):
    """CPU time, the least of three: what other processes of a busy machine take does not count."""
    code = (
        "import torch, time\n"
        "start = time.process_time()\n"
        "import cutemoe\n"
        "print(1e3 * (time.process_time() - start))"
    )
    assert min(float(in_fresh_process(code, tmp_path)) for _ in range(3)) <= LIMIT_MS


@pytest.mark.parametrize("name", cutemoe.__all__)
def test_every_public_name_resolves(name):
    assert getattr(cutemoe, name) is not None
    assert name in dir(cutemoe)


def test_the_lists_of_names_agree():
    assert sorted(cutemoe.__all__) == list(cutemoe.__all__)
    assert set(cutemoe.__all__) == set(cutemoe._LAZY) | {"InvalidCall", "Unsupported"}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        cutemoe.nonsense  # noqa: B018


def test_triton_kernels_is_no_top_level_module(request):
    root = request.config.rootpath
    code = f"import sys; sys.path.insert(0, {str(root)!r}); import triton_kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: this folder is cutemoe.triton_kernels" in done.stderr


def test_triton_kernels_imports_under_its_own_name():
    assert importlib.import_module("cutemoe.triton_kernels").__name__ == "cutemoe.triton_kernels"
