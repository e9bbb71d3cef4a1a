"""Where these tests run: every back end on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import pytest

from cutemoe.gdn import plan
from tests.gdn.cases import Target

NAMES = [b.name for b in reversed(plan.DECODE)]


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(Target(name, device), marks=[pytest.mark.gpu] if device == "cuda" else [])
        for device in ("cpu", "cuda")
        for name in NAMES
    ],
    ids=str,
)
def target(request: pytest.FixtureRequest) -> Target:
    """A back end and a device."""
    request.param.available()
    return request.param
