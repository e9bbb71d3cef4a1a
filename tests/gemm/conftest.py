"""Where the grouped GEMM tests run: every back end on the CPU, and on a GPU where there is one."""

from __future__ import annotations

import pytest

from tests.moe.cases import Target

_GPU = pytest.mark.gpu


@pytest.fixture(
    scope="session",
    params=[
        Target("reference", "cpu"),
        Target("triton", "cpu"),
        pytest.param(Target("reference", "cuda"), marks=_GPU),
        pytest.param(Target("triton", "cuda"), marks=_GPU),
        pytest.param(Target("cute", "cuda"), marks=_GPU),
    ],
    ids=str,
)
def target(request: pytest.FixtureRequest) -> Target:
    """A back end and a device."""
    request.param.available()
    return request.param
