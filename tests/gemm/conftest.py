"""Where the grouped GEMM tests run: every back end on the CPU, and on a GPU where there is one."""

from tests.moe.conftest import target

__all__ = ["target"]
