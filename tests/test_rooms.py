"""Who may import whom. A line that fits no room is a design question, not an exception here."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FAMILIES = ("gemm", "moe", "gdn")
# of a family's files; every other file of it is "api": allocates, packs, registers, documents
ROLES = {
    "reference": "reference",
    "plan": "plan",
    "problem": "problem",
    "tensors": "problem",
    "weight": "problem",
    "activation": "problem",
    "routing": "problem",
    "workspace": "problem",
    "cute_plan": "choice",
    "hybrid": "choice",
    "cute_nvfp4_plan": "choice",
}
# room -> rooms it may import besides itself
MAY = {
    "errors": set(),
    "formats": {"errors"},
    "layouts": {"formats", "errors"},
    "runtime": {"errors"},
    "reference": {"formats", "errors", "problem"},
    "problem": {"formats", "layouts", "errors"},
    "choice": {"problem", "layouts", "errors", "runtime"},
    "plan": {"problem", "errors", "runtime", "choice"},
    "api": {"problem", "plan", "formats", "layouts", "errors", "runtime"},
    "dsl": {"formats", "layouts", "errors", "runtime"},
    # Triton kernels sort and combine for CuTe ones
    "cute": {
        "dsl",
        "formats",
        "layouts",
        "errors",
        "runtime",
        "problem",
        "choice",
        "triton_kernels",
    },
    "triton_kernels": {"formats", "layouts", "errors", "runtime", "problem"},
    "registry": {"errors", "runtime"},
    "public": {"errors", "formats", "layouts", "api", "problem", "registry"},
    "commands": {"public", "errors", "formats", "layouts", "registry", "runtime"},
    "integrations": {"public", "errors", "formats", "layouts"},
    "perf": {"public", "commands", "integrations", "errors", "formats", "layouts"},
}
# a family may use what another family defines
USES: dict[str | None, set[str]] = {"gemm": {"gemm"}, "moe": {"moe", "gemm"}, "gdn": {"gdn"}}
# only these rooms import these packages
HEAVY = {
    "triton": {"triton_kernels", "perf"},
    "cutlass": {"cute", "dsl", "runtime", "perf"},
    "cuda": {"cute", "dsl", "runtime", "perf"},
    "tvm_ffi": {"cute", "dsl", "runtime", "perf"},
    "transformers": {"integrations", "perf"},
}


def room(module: str) -> str:
    """The room of a module of the package or of perf."""
    parts = module.split(".")
    if parts[0] == "perf":
        return "perf"
    if len(parts) == 1:
        return "public"
    if parts[1] == "__main__":
        return "commands"
    if parts[1] not in FAMILIES:
        return parts[1]
    name = parts[2] if len(parts) > 2 else "__init__"
    return ROLES.get(name) or ("cute" if name.startswith("cute_") else "api")


def module_of(path: str) -> str:
    """Dotted name of a file, given relative to the root."""
    parts = Path(path).with_suffix("").parts
    if parts[0] == "triton_kernels":
        parts = ("cutemoe", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exists(module: str) -> bool:
    """A file or folder of that name is in the tree."""
    path = ROOT.joinpath(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and module of every import that runs; those for type checkers do not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from imports(other)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                base = "." * node.level + (node.module or "")
                whole = f"{base}.{alias.name}"
                yield node.lineno, whole if exists(whole) else base
        else:
            yield from imports(node)


def violations(path: str, source: str) -> list[str]:
    """What a file, given relative to the root, imports and may not."""
    here, wrong = module_of(path), []
    mine = room(here)
    for line, target in imports(ast.parse(source)):
        at, top = f"{path}:{line} imports {target}", target.split(".")[0]
        if target.startswith("."):
            wrong.append(f"{at}: relative")
        elif top in ("tests", "triton_kernels"):
            wrong.append(f"{at}: no part of the package")
        elif top in HEAVY and mine not in HEAVY[top]:
            wrong.append(f"{at}: only {sorted(HEAVY[top])} may, this is {mine}")
        elif top in ("cutemoe", "perf"):
            theirs = room(target)
            if theirs not in MAY[mine] | {mine}:
                wrong.append(f"{at}: {mine} may import {sorted(MAY[mine])}, that is {theirs}")
            elif family(target) not in {None, *USES.get(family(here), FAMILIES)}:
                wrong.append(f"{at}: {family(here)} may not use {family(target)}")
    return wrong


def family(module: str) -> str | None:
    """gemm, moe or gdn, or None."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FAMILIES else None


def sources() -> list[str]:
    """Every Python file of the package and of perf, relative to the root."""
    found = [
        p.relative_to(ROOT).as_posix()
        for folder in ("cutemoe", "triton_kernels", "perf")
        for p in (ROOT / folder).rglob("*.py")
    ]
    return sorted(f for f in found if not f.startswith("cutemoe/triton_kernels/"))


@pytest.mark.parametrize("path", sources())
def test_a_file_imports_only_what_its_room_may(path):
    assert violations(path, (ROOT / path).read_text()) == []


def test_every_room_is_in_the_table():
    assert {room(module_of(path)) for path in sources()} <= set(MAY)


@pytest.mark.parametrize(
    ("path", "source", "why"),
    [
        ("cutemoe/formats/x.py", "from cutemoe.runtime import settings", "that is runtime"),
        ("cutemoe/runtime/x.py", "def f():\n    import cutemoe.gdn.plan", "that is plan"),
        ("cutemoe/layouts/x.py", "from cutemoe.gemm.weight import PackedWeight", "is problem"),
        ("cutemoe/moe/reference.py", "from cutemoe.runtime.op import define", "that is runtime"),
        ("cutemoe/moe/problem.py", "from cutemoe.moe import api", "that is api"),
        ("cutemoe/moe/plan.py", "import triton", "only ['perf', 'triton_kernels'] may"),
        (
            "cutemoe/moe/api.py",
            "import cutlass.cute as cute",
            "only ['cute', 'dsl', 'perf', 'ru",
        ),
        ("cutemoe/gemm/api.py", "from cutemoe.moe.problem import Problem", "gemm may not use moe"),
        ("cutemoe/gdn/op.py", "from cutemoe.gemm.weight import x", "gdn may not use gemm"),
        ("cutemoe/gdn/op.py", "from . import plan", "relative"),
        ("triton_kernels/x.py", "from triton_kernels.decode import e", "no part of the package"),
        ("triton_kernels/x.py", "from cutemoe.moe.api import route", "that is api"),
        ("cutemoe/integrations/hf.py", "from cutemoe.moe.api import route", "that is api"),
        ("cutemoe/errors.py", "from tests.close import ulp", "no part of the package"),
        ("perf/x.py", "from cutemoe.gdn.plan import BACKENDS", "that is plan"),
        ("cutemoe/gemm/plan.py", "try:\n    import transformers\nexcept E:\n    0", "only ['int"),
    ],
)
def test_a_planted_import_is_found(path, source, why):
    (found,) = violations(path, source)
    assert found.startswith(path) and why in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "cutemoe/formats/x.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import cutemoe.moe.api",
        ),
        ("cutemoe/moe/api.py", "from cutemoe.gemm import weight"),
        ("cutemoe/gdn/cute_x.py", "import cutlass.cute as cute"),
    ],
)
def test_what_the_table_allows_passes(path, source):
    assert violations(path, source) == []
