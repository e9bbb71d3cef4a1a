"""Every environment variable the package reads. Each is also an argument of what uses it.

| variable | argument | meaning |
|---|---|---|
| CUTEMOE_BACKEND | backend= | back end to use where a call says "auto" |
| CUTEMOE_CACHE_DIR | --cache-dir | folder of compiled kernels; empty: none is kept |
| CUTEMOE_NO_JIT | no_jit() | an error where a kernel would have to be compiled |
| XDG_CACHE_HOME | - | the system's own: where the folder is made unless named |
| TRITON_INTERPRET | - | Triton's own: run Triton kernels on CPU tensors |
"""

import os
from pathlib import Path
from typing import Any

# os.environ takes 0.7 us to say that a variable is not set, its dict 0.03 (two CPU cores, 2026-11)
_VARIABLES: Any = getattr(os.environ, "_data", None) if os.name == "posix" else None


def default_backend() -> str:
    """Back end for calls that pass backend="auto"."""
    if _VARIABLES is not None and b"CUTEMOE_BACKEND" not in _VARIABLES:
        return "auto"
    return os.environ.get("CUTEMOE_BACKEND", "auto")


def cache_dir() -> Path | None:
    """Folder of compiled kernels, by default that of the user's caches; None keeps nothing."""
    given = os.environ.get("CUTEMOE_CACHE_DIR")
    if given is not None:
        return Path(given).expanduser() if given else None
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "cutemoe"
    home = Path("~").expanduser()
    return home / ".cache" / "cutemoe" if home.is_absolute() else None


def set_cache_dir(folder: str) -> None:
    """What --cache-dir sets, for this process and those it starts."""
    os.environ["CUTEMOE_CACHE_DIR"] = folder


def worker_environment(arch: str) -> dict[str, str]:
    """The environment of a process that compiles for an architecture and sees no GPU."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "CUTE_DSL_ARCH": arch, "OMP_NUM_THREADS": "1"}
    return {**os.environ, **hidden, "TRITON_INTERPRET": "0", "CUTEMOE_NO_JIT": "0"}


def no_jit() -> bool:
    """True where a kernel that has to be compiled is an error."""
    return os.environ.get("CUTEMOE_NO_JIT", "0") not in ("", "0")


def triton_interprets() -> bool:
    """True where Triton's CPU interpreter is switched on; read by Triton at kernel definition."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
