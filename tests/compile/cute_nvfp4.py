"""Cross-compiles the kernels of NVFP4 layers."""

from __future__ import annotations

from typing import Any

from tests.compile.cute_harness import worker


def ask(build: str, config: Any, arch: str) -> dict[str, Any]:
    """Registers, local bytes, SASS and PTX of what a function of cute_nvfp4_build builds."""
    return worker().ask(f"cutemoe.moe.cute_nvfp4_build:{build}", config, arch)
