"""Where the MoE tests run: every back end on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import pytest

from tests.moe.cases import Target, targets


@pytest.fixture(
    scope="session", params=targets("reference", "triton", "cute", "cute_nvfp4"), ids=str
)
def target(request: pytest.FixtureRequest) -> Target:
    """A back end and a device."""
    request.param.available()
    return request.param
