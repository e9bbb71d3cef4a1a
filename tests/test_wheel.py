"""The wheel holds every module and one top-level name, and works away from the sources."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("cutemoe", "triton_kernels")


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output; the whole transcript where the command fails."""
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def sources() -> set[str]:
    """Tracked Python files of the package, as they are named when installed."""
    try:
        listed = run("git", "ls-files", *FOLDERS, cwd=ROOT).split()
        # new files before their first commit
        listed += run("git", "ls-files", "-o", "--exclude-standard", *FOLDERS, cwd=ROOT).split()
    except (AssertionError, OSError):
        listed = [p.relative_to(ROOT).as_posix() for f in FOLDERS for p in (ROOT / f).rglob("*.py")]
        listed = [n for n in listed if not n.startswith("cutemoe/triton_kernels/")]
    names = {n for n in listed if n.endswith(".py") and (ROOT / n).is_file()}
    return {f"cutemoe/{n}" if n.startswith("triton_kernels/") else n for n in names}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built offline from a copy: building leaves folders in its source tree."""
    copy = tmp_path_factory.mktemp("source") / "tree"
    for name in (*FOLDERS, "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, symlinks=True, ignore=ignore)
        else:
            copy.mkdir(exist_ok=True)
            shutil.copy(source, copy / name)
    target = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel")
    run(*pip, "--no-deps", "--no-build-isolation", "--no-index", "-w", target, copy, cwd=target)
    (built,) = target.glob("cutemoe-*.whl")
    return built


def test_it_holds_every_tracked_module_and_no_other(wheel):
    with zipfile.ZipFile(wheel) as z:
        inside = {n for n in z.namelist() if n.endswith(".py")}
    assert inside == sources()


def test_it_has_one_top_level_name(wheel):
    with zipfile.ZipFile(wheel) as z:
        (top,) = (n for n in z.namelist() if n.endswith("top_level.txt"))
        assert z.read(top).decode().split() == ["cutemoe"]
        assert {n.split("/")[0].split("-")[0] for n in z.namelist()} == {"cutemoe"}
        assert "cutemoe/py.typed" in z.namelist()
        assert any(n.endswith("licenses/LICENSE") for n in z.namelist())


def test_it_works_away_from_the_sources(wheel, tmp_path):
    site, cwd = tmp_path / "site", tmp_path / "elsewhere"
    cwd.mkdir()
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install")
    run(*pip, "--no-deps", "--no-index", "--target", site, wheel, cwd=cwd)
    code = f"""
import sys
sys.path.insert(0, {str(site)!r})
import cutemoe, torch
assert cutemoe.__file__.startswith({str(site)!r}), cutemoe.__file__
import cutemoe.triton_kernels, cutemoe.layouts, cutemoe.__main__
ids, weights = cutemoe.route(torch.tensor([[0.0, 2.0, 1.0]]), 2)
assert ids.tolist() == [[1, 2]] and torch.allclose(weights.sum(), torch.tensor(1.0))
w = cutemoe.quantize(torch.ones(3, 4, 32), "mxfp4")
x = torch.ones(2, 32, dtype=torch.bfloat16)
y = cutemoe.grouped_gemm(x, w, torch.tensor([0, 1, 1, 2], dtype=torch.int32))
assert y.shape == (2, 4) and (y == 32).all(), y
"""
    run(sys.executable, "-c", code, cwd=cwd)


def test_every_package_is_on_the_list():
    """A package left off pyproject's list is silently absent from the wheel."""
    listed = (ROOT / "pyproject.toml").read_text()
    folders = {p.parent for f in FOLDERS for p in (ROOT / f).rglob("*.py")}
    for folder in folders:
        parts = folder.relative_to(ROOT).parts
        name = ".".join(parts if parts[0] == "cutemoe" else ("cutemoe", *parts))
        assert f'"{name}"' in listed, f"{name} is not in pyproject.toml"
