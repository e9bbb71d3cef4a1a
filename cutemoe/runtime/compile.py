"""Compiled kernels by configuration: one build for each key, kept in this process and on disk.

Decision: the key is the frozen configuration a kernel is built from, and the architecture. A build
needs no tensor, so the cache of cache.py stands between `lookup` and `build` without a change in
any kernel, and `cutemoe compile` builds without a GPU. A kernel that was just compiled is loaded
from the object that later processes load, so there is one path to test. Rejected: the disk cache of
the DSL, which `cute.compile` never uses, and `functools.cache`, which neither locks (`cute.compile`
is not thread-safe) nor knows that a CUDA graph is being captured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import logging
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import torch

from cutemoe.errors import InvalidCall
from cutemoe.runtime import cache, preset, settings
from cutemoe.runtime.device import Device, current_index, target

Config = TypeVar("Config", bound=Hashable)

_LOG = logging.getLogger("cutemoe.compile")
_LOCK = threading.RLock()
_KERNELS: dict[tuple[Any, ...], Any] = {}
_BUILDS: list[float] = []
_LOADS: list[float] = []
_FETCHED: dict[str, Fetched] = {}
_FORBIDDEN: list[bool] = []
_PACKAGE = Path(__file__).parents[1]
_SOURCES = {
    "cute": ("*/cute_*.py", "dsl/*.py", "formats/*.py", "layouts/*.py"),
    "triton": ("triton_kernels/*.py", "formats/*.py", "layouts/*.py"),
}
_VERSIONS = {
    "cute": (
        "nvidia-cutlass-dsl",
        "nvidia-cutlass-dsl-libs-base",
        "nvidia-cutlass-dsl-libs-core",
        "nvidia-cutlass-dsl-libs-cu12",
        "nvidia-cutlass-dsl-libs-cu13",
        "apache-tvm-ffi",
    ),
    "triton": ("triton",),
}
# what every object exports its kernel as
_ENTRY = "kernel"


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A kernel this process got from the cache: whether compiled for it, in how many seconds."""

    kernel: str
    built: bool
    seconds: float
    nbytes: int


class NotCompiled(InvalidCall):
    """A kernel would have to be compiled, and CUTEMOE_NO_JIT or a graph capture forbids it."""

    def during(self, problem: Any, device: Device) -> NotCompiled:
        """The same with the call it happened in, and the presets that compile for it."""
        names = preset.covering(problem)
        fix = " or ".join(f"--preset {name}" for name in names) or (
            "no preset compiles it, so make the call once without CUTEMOE_NO_JIT; presets: "
            f"{', '.join(preset.PRESETS)}"
        )
        return NotCompiled(
            f"{self}; {problem} on {device} (cutemoe compile --arch {device.target} {fix})"
        )


class _Unkept(Exception):
    """A kernel that cannot be written to disk."""

    def __init__(self, kernel: Any) -> None:
        super().__init__()
        self.kernel = kernel


def compiled(build: Callable[[Config], Any]) -> Callable[[Config], Any]:
    """A build function whose kernels are kept: the second call of a configuration only looks up.

    What a build function of a module makes of a dataclass is kept on disk too, where it has the
    DSL's `export_to_c`; the configuration must then say all that the code depends on. Inside
    `compile_only` the kernel does nothing when called.

    Raises:
        NotCompiled: a kernel would have to be compiled, and CUTEMOE_NO_JIT is set or a CUDA graph
            is being captured.
    """

    @wraps(build)
    def lookup(config: Config) -> Any:
        machine = target()
        key = (build, config, current_index() if machine is None else machine)
        kernel = _KERNELS.get(key)
        return _kernel(key, build, config, machine) if kernel is None else kernel

    return lookup


def _kernel(
    key: tuple[Any, ...], build: Callable[[Config], Any], config: Config, machine: Device | None
) -> Any:
    check_capture(f"{build.__name__}({config})")
    with _LOCK:
        if key not in _KERNELS:
            made = _persistent(build, config, machine)
            _KERNELS[key] = made if machine is None else _nothing
        return _KERNELS[key]


def _nothing(*_: Any) -> None:
    """What a kernel for another machine does here."""


def _persistent(build: Callable[[Config], Any], config: Config, machine: Device | None) -> Any:
    """The kernel of a configuration, from disk where it is kept there."""
    what = f"{build.__name__}({config})"
    keep = dataclasses.is_dataclass(config) and "<locals>" not in build.__qualname__
    if machine is None and torch.cuda.is_available():
        machine = Device.of(torch.device("cuda"))
    if not keep or machine is None or " at 0x" in repr(config):
        return _timed(what, lambda: build(config))
    facts = (*facts_of("cute", build.__module__), _toolkit(), platform.machine())
    name = f"{build.__module__}:{build.__qualname__}"
    parts = (*facts, name, _fields(config))

    def make() -> tuple[bytes, dict[str, Any]]:
        kernel = build(config)
        if not hasattr(kernel, "export_to_c"):
            raise _Unkept(kernel)
        return _exported(kernel), {"language": "cute", "kernel": name}

    try:
        entry = fetch(what, parts, machine.target, make)
    except _Unkept as e:
        return e.kernel
    return _loaded(entry.data)


def fetch(
    what: str,
    parts: tuple[str, ...],
    arch: str,
    make: Callable[[], tuple[bytes, dict[str, Any]]],
) -> cache.Entry:
    """The entry of a kernel, from disk or from `make`, by one process at a time.

    Args:
        what: name and configuration, for people.
        parts: everything the object depends on besides the architecture.
        make: compiles; returns the object and further fields of its manifest.

    Raises:
        NotCompiled: it would have to be compiled and CUTEMOE_NO_JIT is set.
    """
    key = hashlib.sha256("\n".join((arch, *parts)).encode()).hexdigest()
    kept = cache.opened()
    start = time.perf_counter()
    if kept is not None and (entry := kept.get(key, arch)) is not None:
        return _took(key, entry, start)
    check_allowed(what)
    with _LOCK, contextlib.nullcontext() if kept is None else kept.lock(key):
        if kept is not None and (entry := kept.get(key, arch)) is not None:
            return _took(key, entry, start)
        start = time.perf_counter()
        data, fields = _timed(what, make)
        seconds = round(time.perf_counter() - start, 3)
        manifest = {"arch": arch, "what": what, "seconds": seconds, "parts": parts, **fields}
        _FETCHED[key] = Fetched(fields["kernel"], True, seconds, len(data))
        if kept is not None:
            try:
                return kept.put(key, data, manifest)
            except OSError as e:
                _LOG.warning("%s is not kept: %s", what, e)
            except cache.Broken as e:
                raise RuntimeError(f"{what}: {e} (unset CUTE_DSL_ARCH)") from None
        return cache.Entry(manifest, data)


def _took(key: str, entry: cache.Entry, start: float) -> cache.Entry:
    seconds = time.perf_counter() - start
    _LOADS.append(seconds)
    _FETCHED.setdefault(key, Fetched(entry.manifest["kernel"], False, seconds, len(entry.data)))
    return entry


def _timed(what: str, make: Callable[[], Any]) -> Any:
    check_allowed(what)
    start = time.perf_counter()
    made = make()
    _BUILDS.append(time.perf_counter() - start)
    _LOG.info("compiled %s in %.2f s", what, _BUILDS[-1])
    return made


def check_capture(what: str) -> None:
    """Raises NotCompiled where a CUDA graph is being captured: nothing is compiled or loaded."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise NotCompiled(
            f"CUDA graph capture: expected a compiled kernel, got none for {what} (make the call "
            "once before the capture)"
        )


def check_allowed(what: str) -> None:
    """Raises NotCompiled where CUTEMOE_NO_JIT or `no_jit` forbids to compile."""
    if _FORBIDDEN or settings.no_jit():
        folder = settings.cache_dir()
        raise NotCompiled(
            f"CUTEMOE_NO_JIT: expected a compiled kernel in {folder or 'CUTEMOE_CACHE_DIR'}, got "
            f"none for {what}"
        )


@contextlib.contextmanager
def no_jit() -> Iterator[None]:
    """Inside, as under CUTEMOE_NO_JIT=1: a kernel that has to be compiled is an error."""
    _FORBIDDEN.append(True)
    try:
        yield
    finally:
        _FORBIDDEN.pop()


def build_count() -> int:
    """Kernels compiled by this process so far."""
    return len(_BUILDS)


def load_count() -> int:
    """Kernels taken from disk by this process so far."""
    return len(_LOADS)


def fetched() -> dict[str, Fetched]:
    """Every kernel this process compiled or took from disk, by key."""
    return dict(_FETCHED)


def load_seconds() -> list[float]:
    """Seconds of every look-up on disk that found its kernel."""
    return list(_LOADS)


def build_seconds() -> float:
    """Seconds this process spent compiling."""
    return sum(_BUILDS)


def facts_of(language: str, module: str) -> tuple[str, ...]:
    """What every kernel of a language depends on: sources and versions."""
    return (language, *_versions(language), _sources(language), _source_of(module))


@lru_cache(maxsize=4)
def _versions(language: str) -> tuple[str, ...]:
    found = []
    for name in ("cutemoe", *_VERSIONS[language]):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {importlib.metadata.version(name)}")
    return tuple(found)


@lru_cache(maxsize=4)
def _sources(language: str) -> str:
    """Digest of every file of the package that a kernel of the language can be made of."""
    paths = {p for pattern in _SOURCES[language] for p in _PACKAGE.glob(pattern)}
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@lru_cache(maxsize=64)
def _source_of(module: str) -> str:
    """Digest of the file a kernel is made in, which may lie outside the package."""
    path = getattr(importlib.import_module(module), "__file__", None)
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def _fields(config: Any) -> str:
    values = ", ".join(f"{f.name}={getattr(config, f.name)!r}" for f in dataclasses.fields(config))
    return f"{type(config).__qualname__}({values})"


# what differs between releases of the DSL stays below this line


@lru_cache(maxsize=1)
def _toolkit() -> str:
    """Which CUDA the DSL compiles with; it picks one by the driver when it is imported."""
    import cutlass

    found = getattr(cutlass, "CUDA_VERSION", None)
    return "" if found is None else f"CUDA {found.major}.{found.minor}"


def _exported(kernel: Any) -> bytes:
    """The object file of a kernel compiled with --enable-tvm-ffi."""
    with tempfile.TemporaryDirectory(prefix="cutemoe-") as folder:
        path = Path(folder) / "kernel.o"
        kernel.export_to_c(str(path), _ENTRY)
        return path.read_bytes()


def _loaded(data: bytes) -> Any:
    """The kernel of an object file, without a compiler and without a linker."""
    from cutlass.runtime import load_module

    with tempfile.NamedTemporaryFile(prefix="cutemoe-", suffix=".o") as f:
        f.write(data)
        f.flush()
        return getattr(load_module(f.name, enable_tvm_ffi=True), _ENTRY)


def cute_unavailable(device: Device) -> str | None:
    """Why no CuTe kernel runs on this device, whatever the problem."""
    if device.type != "cuda":
        return f"needs a CUDA device, got {device}"
    if device.arch < 80:
        return f"needs sm_80 or newer, got sm_{device.arch}"
    missing = _missing()
    return f"{missing} is not installed" if missing else None


@lru_cache(maxsize=1)
def _missing() -> str | None:
    packages = {"cutlass": "nvidia-cutlass-dsl", "tvm_ffi": "apache-tvm-ffi"}
    for module, package in packages.items():
        if importlib.util.find_spec(module) is None:
            return package
    return None
