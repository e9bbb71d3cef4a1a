"""Sizes, arguments, docstrings, settings: the budgets that keep the code readable."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEVICE_FILE, HOST_FILE = 700, 400
DEVICE_FUNCTION, HOST_FUNCTION = 150, 60
ARGUMENTS = 20
SETTINGS = 8
ENVIRONMENT = ("os.environ", "os.getenv", "environ", "getenv")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def files(*folders: str) -> list[str]:
    """Python files of the folders, relative to the root."""
    found = [p.relative_to(ROOT).as_posix() for f in folders for p in (ROOT / f).rglob("*.py")]
    return sorted(f for f in found if not f.startswith("cutemoe/triton_kernels/"))


PACKAGE = files("cutemoe", "triton_kernels")
ALL = [*PACKAGE, *files("perf", "tests")]
package = pytest.mark.parametrize("path", PACKAGE)


def is_device_file(path: str) -> bool:
    """Holds kernels: Triton back ends and CuTe files."""
    return path.startswith(("triton_kernels/", "cutemoe/dsl/")) or "/cute_" in path


def is_device_function(node: Function) -> bool:
    """Compiled for a GPU: @triton.jit, @cute.jit, @cute.kernel."""
    names = [ast.unparse(d).split("(")[0] for d in node.decorator_list]
    return any(n in ("jit", "kernel") or n.endswith((".jit", ".kernel")) for n in names)


def functions(tree: ast.AST) -> Iterator[Function]:
    """Every function, nested ones too."""
    yield from (n for n in ast.walk(tree) if isinstance(n, Function))


def docstring_lines(f: Function) -> int:
    """Documentation is no part of a function's length."""
    first = f.body[0]
    if not isinstance(first, ast.Expr) or not ast.get_docstring(f):
        return 0
    return (first.end_lineno or first.lineno) - first.lineno + 1


def too_long(path: str, source: str) -> list[str]:
    """Files, functions and signatures over budget."""
    found = []
    limit = DEVICE_FILE if is_device_file(path) else HOST_FILE
    # tests are lists of cases: their length is no complexity
    if not path.startswith("tests/") and (lines := source.count("\n")) > limit:
        found.append(f"{path}: {lines} lines, at most {limit}")
    for f in functions(ast.parse(source)):
        limit = DEVICE_FUNCTION if is_device_function(f) else HOST_FUNCTION
        lines = (f.end_lineno or f.lineno) - f.lineno + 1 - docstring_lines(f)
        if lines > limit:
            found.append(f"{path}:{f.lineno} {f.name}: {lines} lines, at most {limit}")
        a = f.args
        count = len(a.posonlyargs + a.args + a.kwonlyargs) + bool(a.vararg) + bool(a.kwarg)
        if count > ARGUMENTS:
            found.append(f"{path}:{f.lineno} {f.name}: {count} arguments, at most {ARGUMENTS}")
    return found


def forbidden(path: str, source: str) -> list[str]:
    """`global`, asserts (python -O removes them), and the environment read outside settings."""
    found = []
    for node in ast.walk(ast.parse(source)):
        text = ast.unparse(node) if isinstance(node, ast.Attribute | ast.Name) else ""
        if isinstance(node, ast.Global):
            why = "global"
        elif isinstance(node, ast.Assert):
            why = "assert: raise InvalidCall, or return a reason"
        elif text in ENVIRONMENT and path != "cutemoe/runtime/settings.py":
            why = f"{text}: read it in runtime/settings.py"
        elif text == "print" and not path.startswith(("cutemoe/commands/", "cutemoe/__main__")):
            why = "print"
        else:
            continue
        found.append(f"{path}:{getattr(node, 'lineno', 0)} {why}")
    return found


def undocumented(path: str, source: str) -> list[str]:
    """Public modules, classes, host functions and methods without a docstring."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else [f"{path}: module"]

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if isinstance(child, ast.If | ast.Try | ast.With):
                    visit(child, prefix)
                continue
            device = isinstance(child, Function) and is_device_function(child)
            if child.name.startswith("_") or device:
                continue
            if not ast.get_docstring(child) and not _overloads(child):
                found.append(f"{path}:{child.lineno} {prefix}{child.name}")
            if isinstance(child, ast.ClassDef):
                visit(child, f"{child.name}.")

    visit(tree, "")
    return found


def _overloads(node: ast.AST) -> bool:
    names = [ast.unparse(d) for d in getattr(node, "decorator_list", [])]
    return any(n.endswith(("overload", ".setter")) for n in names)


@pytest.mark.parametrize("path", ALL)
def test_files_functions_and_signatures_are_short(path):
    assert too_long(path, (ROOT / path).read_text()) == []


@package
def test_no_global_no_assert_no_environment_no_print(path):
    assert forbidden(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", [*PACKAGE, *files("perf")])
def test_everything_public_has_a_docstring(path):
    assert undocumented(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize("path", ALL)
def test_no_file_is_called_after_nothing(path):
    assert Path(path).stem not in {"utils", "util", "common", "helpers", "misc"}
    assert not re.search(r"_v\d+$", Path(path).stem)


def test_settings_are_few_and_listed():
    """Every variable that settings.py reads stands in its docstring and in the README's table."""
    source = (ROOT / "cutemoe/runtime/settings.py").read_text()
    tree = ast.parse(source)
    read = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("os.environ.get", "os.getenv")
        and isinstance(node.args[0], ast.Constant)
    } | {
        node.slice.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and ast.unparse(node.value) == "os.environ"
        and isinstance(node.slice, ast.Constant)
    }
    listed = set(re.findall(r"^\| ([A-Z_]{4,}) \|", ast.get_docstring(tree) or "", re.MULTILINE))
    readme = (ROOT / "README.md").read_text()
    shown = set(re.findall(r"^\| `([A-Z_]{4,})` \|", readme, re.MULTILINE))
    assert read == listed == shown
    assert 0 < len(read) <= SETTINGS


LONG = "def f():\n" + "    x = 1\n" * 60
KERNEL = "@triton.jit\n" + LONG


@pytest.mark.parametrize(
    ("path", "source", "count"),
    [
        ("cutemoe/x.py", "x = 1\n" * 401, 1),
        ("triton_kernels/x.py", "x = 1\n" * 401, 0),
        ("cutemoe/gdn/cute_x.py", "x = 1\n" * 701, 1),
        ("cutemoe/x.py", LONG, 1),
        ("cutemoe/x.py", LONG.replace("    x = 1\n", "    '''A\n\n    B'''\n", 1), 0),
        ("triton_kernels/x.py", LONG, 1),
        ("triton_kernels/x.py", KERNEL, 0),
        ("cutemoe/gdn/cute_x.py", KERNEL.replace("triton.jit", "cute.kernel") * 2, 0),
        ("triton_kernels/x.py", KERNEL + "    x = 1\n" * 100, 1),
        ("cutemoe/x.py", f"def f({', '.join(f'a{i}' for i in range(21))}): pass", 1),
        ("cutemoe/x.py", f"def f(*args, {', '.join(f'a{i}' for i in range(19))}): pass", 0),
    ],
)
def test_the_length_check_can_fail(path, source, count):
    assert len(too_long(path, source)) == count


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("def f():\n    global x", 1),
        ("def f():\n    assert x", 1),
        ("import os\nos.environ['A'] = '1'", 1),
        ("from os import getenv\ngetenv('A')", 1),
        ("print(1)", 1),
        ("raise ValueError", 0),
    ],
)
def test_the_check_of_forbidden_things_can_fail(source, count):
    assert len(forbidden("cutemoe/x.py", source)) == count


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("x = 1", 1),
        ("'''Doc.'''\ndef f(): pass\ndef _g(): pass", 1),
        (
            "'''Doc.'''\nclass A:\n    '''Doc.'''\n    def f(self): 0\n    def __init__(self): 0",
            1,
        ),
        ("'''Doc.'''\nclass _A:\n    def f(self): pass", 0),
        ("'''Doc.'''\nif x:\n    def f(): pass", 1),
        ("'''Doc.'''\n@triton.jit\ndef f(): pass", 0),
    ],
)
def test_the_docstring_check_can_fail(source, count):
    assert len(undocumented("cutemoe/x.py", source)) == count
