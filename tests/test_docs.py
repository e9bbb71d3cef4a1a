"""What the documentation shows runs: README blocks in order, and doctests of public modules."""

import contextlib
import doctest
import importlib
import io
import os
import pkgutil
import re
import traceback
from pathlib import Path

import pytest
import torch

import cutemoe

README = Path(__file__).parents[1] / "README.md"
# import a library of an extra, or a GPU compiler
OPTIONAL = ("cutemoe.integrations", "cutemoe.triton_kernels")


def blocks() -> list[tuple[int, str]]:
    """First line and text of every Python block of the README."""
    text = README.read_text()
    return [
        (text.count("\n", 0, m.start()) + 2, m.group(1))
        for m in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    ]


def test_the_readme_has_examples():
    assert README.is_file(), "README.md is missing"
    assert len(blocks()) >= 3


def test_the_examples_of_the_readme_run(tmp_path, monkeypatch):
    """One after the other in one namespace, as a reader pastes them."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    for line, code in blocks():
        padded = "\n" * (line - 1) + code
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(padded, str(README), "exec"), names)
        except ImportError as e:
            if e.name in ("transformers", "matplotlib"):
                continue
            pytest.fail(f"README.md, block at line {line}: {e}")
        except Exception:
            pytest.fail(f"README.md, block at line {line}:\n{traceback.format_exc()}")


def modules() -> list[str]:
    """Every module of the package that needs no extra and no GPU compiler."""
    found = pkgutil.walk_packages(cutemoe.__path__, "cutemoe.")
    names = [m.name for m in found if not m.name.startswith(OPTIONAL)]
    return [n for n in names if n.rsplit(".", 1)[-1] != "__main__" and ".cute_" not in n]


@pytest.mark.parametrize("name", modules())
def test_doctests(name):
    module = importlib.import_module(name)
    torch.manual_seed(0)
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS, verbose=False)
    assert failed == 0


@pytest.mark.skipif(os.name != "posix", reason="paths of a checkout")
def test_the_links_of_the_readme_exist():
    for target in re.findall(r"\]\((?!http|#)([^)#]+)", README.read_text()):
        assert (README.parent / target).exists(), target
