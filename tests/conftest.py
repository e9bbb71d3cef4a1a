"""Session set-up: helper imports, Triton's interpreter, markers, hypothesis profiles and counts.

Helpers are imported as `from tests.close import ...`. Tests run in importlib mode and are no
packages, and the repository root must stay off sys.path (there a top-level `triton_kernels` would
be importable), so this file registers `tests` as a namespace whose path is this folder.

Without a CUDA device TRITON_INTERPRET=1 is set here, before anything imports Triton: it decides at
kernel definition, so one process either interprets kernels or compiles them. Cross-compile tests
therefore ask a worker process (tests/compile/harness.py).

Profiles, chosen with --hypothesis-profile: `ci` (the default where CI is set: derandomised),
`dev` (the default elsewhere) and `nightly` (for a GPU). Every run reports how many examples
completed; --min-examples N fails the session below N.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

if not hasattr(sys.modules.get("tests"), "__path__"):
    sys.modules["tests"] = types.ModuleType("tests")
sys.modules["tests"].__path__ = [str(Path(__file__).parent)]  # type: ignore[attr-defined]

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "ci",
    max_examples=24,
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=_SLOW,
)
settings.register_profile("dev", max_examples=15, deadline=None, suppress_health_check=_SLOW)
settings.register_profile(
    "nightly", max_examples=500, deadline=None, print_blob=True, suppress_health_check=_SLOW
)
settings.load_profile("ci" if os.environ.get("CI") else "dev")

_EXAMPLES = "hypothesis_examples"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--min-examples",
        type=int,
        default=0,
        help="fail the session unless this many hypothesis examples completed",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if not HAS_GPU and "gpu" in item.keywords:
            item.add_marker(skip)
        handle = getattr(getattr(item, "obj", None), "hypothesis", None)
        if handle is not None and not hasattr(handle.inner_test, "completed"):
            handle.inner_test = _counting(handle.inner_test)


def _counting(test: Callable[..., Any]) -> Callable[..., Any]:
    """The body of a property with a count of the examples that ran to its end."""

    @functools.wraps(test)
    def counted(*args: Any, **kwargs: Any) -> Any:
        result = test(*args, **kwargs)
        counted.completed += 1  # type: ignore[attr-defined]
        return result

    counted.completed = 0  # type: ignore[attr-defined]
    return counted


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    handle = getattr(getattr(item, "obj", None), "hypothesis", None)
    if handle is None:
        return (yield)
    before = handle.inner_test.completed
    try:
        return (yield)
    finally:
        item.user_properties.append((_EXAMPLES, handle.inner_test.completed - before))


class ExampleCount:
    """Sums the completed examples of all reports; with xdist only the controller keeps one."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.examples, self.tests = wanted, 0, 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            counts = [n for key, n in report.user_properties if key == _EXAMPLES]
            self.examples += sum(int(n) for n in counts)  # type: ignore[call-overload]
            self.tests += len(counts)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.examples < self.wanted and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        line = f"hypothesis: {self.examples} examples completed in {self.tests} properties"
        if self.examples < self.wanted:
            terminalreporter.write_line(f"{line}, fewer than {self.wanted}", red=True)
        elif self.tests:
            terminalreporter.write_line(line)


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(ExampleCount(int(config.getoption("--min-examples") or 0)))


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and the GPU where there is one."""
    return torch.device(request.param)
