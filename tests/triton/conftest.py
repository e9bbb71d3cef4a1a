"""The kernels of these tests take CPU tensors: without the interpreter there is nothing to run."""

from pathlib import Path

import pytest

from cutemoe.runtime import settings


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests of this folder where kernels are compiled."""
    if settings.triton_interprets():
        return
    skip = pytest.mark.skip(reason="needs TRITON_INTERPRET=1 before the first import of Triton")
    for item in items:
        if Path(__file__).parent in item.path.parents and "gpu" not in item.keywords:
            item.add_marker(skip)
