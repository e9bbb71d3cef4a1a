"""Every environment variable the package reads. Each is also an argument of the public functions.

| variable | argument | meaning |
|---|---|---|
| CUTEMOE_BACKEND | backend= | back end to use where a call says "auto" |
| TRITON_INTERPRET | - | Triton's own: run Triton kernels on CPU tensors |
"""

import os


def default_backend() -> str:
    """Back end for calls that pass backend="auto"."""
    return os.environ.get("CUTEMOE_BACKEND", "auto")


def triton_interprets() -> bool:
    """True where Triton's CPU interpreter is switched on; read by Triton at kernel definition."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
