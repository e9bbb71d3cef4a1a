"""cutemoe: GPU kernels for 4-bit mixture-of-experts layers and gated delta nets.

Names load on first use: `import cutemoe` imports neither Triton nor CuTe and touches no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cutemoe.errors import InvalidCall, Unsupported

__version__ = "0.1.0"

_LAZY = {
    "QuantizedTensor": "cutemoe.formats",
    "quantize": "cutemoe.formats",
    "route": "cutemoe.moe.api",
    "prepare_moe": "cutemoe.moe.api",
    "PreparedMoE": "cutemoe.moe.prepare",
    "fused_moe": "cutemoe.moe.api",
    "Workspace": "cutemoe.moe.workspace",
    "SwiGLU": "cutemoe.moe.activation",
    "GeGLU": "cutemoe.moe.activation",
    "ReLU2": "cutemoe.moe.activation",
    "grouped_gemm": "cutemoe.gemm.api",
    "prepare_grouped_gemm": "cutemoe.gemm.api",
    "PreparedGroupedGemm": "cutemoe.gemm.prepare",
    "gdn_decode": "cutemoe.gdn.api",
    "gdn_verify": "cutemoe.gdn.api",
    "GDNDraft": "cutemoe.gdn.draft",
    "bind": "cutemoe.registry",
    "explain": "cutemoe.registry",
    "backends": "cutemoe.registry",
}

if TYPE_CHECKING:
    from cutemoe.formats import QuantizedTensor, quantize
    from cutemoe.gdn.api import gdn_decode, gdn_verify
    from cutemoe.gdn.draft import GDNDraft
    from cutemoe.gemm.api import grouped_gemm, prepare_grouped_gemm
    from cutemoe.gemm.prepare import PreparedGroupedGemm
    from cutemoe.moe.activation import GeGLU, ReLU2, SwiGLU
    from cutemoe.moe.api import fused_moe, prepare_moe, route
    from cutemoe.moe.prepare import PreparedMoE
    from cutemoe.moe.workspace import Workspace
    from cutemoe.registry import backends, bind, explain

__all__ = [
    "GDNDraft",
    "GeGLU",
    "InvalidCall",
    "PreparedGroupedGemm",
    "PreparedMoE",
    "QuantizedTensor",
    "ReLU2",
    "SwiGLU",
    "Unsupported",
    "Workspace",
    "backends",
    "bind",
    "explain",
    "fused_moe",
    "gdn_decode",
    "gdn_verify",
    "grouped_gemm",
    "prepare_grouped_gemm",
    "prepare_moe",
    "quantize",
    "route",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'cutemoe' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
