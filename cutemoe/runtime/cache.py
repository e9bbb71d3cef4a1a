"""Compiled kernels on disk, one folder a user: what was compiled once is loaded ever after.

| file | holds |
|---|---|
| <key>.bin | the object: a cubin (Triton), or an object file with host code and cubin (CuTe) |
| <key>.json | the sha256 of the rest of this file on line 1; then the manifest, one json object |
| locks/<key> | locked while the key is being compiled |

The manifest has the sha256 of the object and is written last, both by an atomic replace. A reader
takes an entry only if both digests are right, and owner, permissions and architecture are too; any
other entry counts as absent and is compiled again.

Decision: a digest, because an object with changed bytes loads without a complaint (2026-11, CuTe
DSL 4.8.1). An object holds host code, so a folder that others can write to is refused: whoever
writes there runs code here. Root's folders may be read: images are built by root.
Rejected: the system's temporary folder, pickles, and one lock for all keys.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from cutemoe.runtime import settings

_LOG = logging.getLogger("cutemoe.cache")
_CUBIN = re.compile(rb"\x7fELF\x02\x01.{10}\x02\x00\xbe\x00", re.DOTALL)
FORMAT = 1


@dataclass(frozen=True)
class Entry:
    """One compiled kernel: its manifest and its object."""

    manifest: dict[str, Any]
    data: bytes


class Broken(Exception):
    """An entry that must not be loaded, and why."""


@dataclass(frozen=True)
class Cache:
    """The entries of a folder."""

    folder: Path

    def trouble(self) -> str | None:
        """Why nothing may be read from the folder, or None; a missing folder is made."""
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.folder.stat()
        except OSError as e:
            return f"{self.folder}: {e.strerror or e} (set CUTEMOE_CACHE_DIR to a folder of yours)"
        if found.st_uid not in (0, os.geteuid()):
            return (
                f"{self.folder} belongs to uid {found.st_uid}, not to {os.geteuid()} or root "
                "(set CUTEMOE_CACHE_DIR to a folder of yours)"
            )
        if found.st_mode & 0o022:
            return f"{self.folder} can be written by others (chmod 700 {self.folder})"
        return None

    def get(self, key: str, arch: str) -> Entry | None:
        """The entry of a key, or None; a broken one is logged and counts as absent."""
        try:
            return self.read(key, arch)
        except FileNotFoundError:
            return None
        except (Broken, OSError) as e:
            _LOG.warning("cache entry %s is compiled again: %s", key[:16], e)
            return None

    def read(self, key: str, arch: str | None = None) -> Entry:
        """The entry of a key.

        Raises:
            FileNotFoundError: there is none.
            Broken: it is not what was written, or not for this architecture.
        """
        digest, _, text = _owned(self._manifest(key)).partition(b"\n")
        if digest != _sha256(text):
            raise Broken("its manifest is not what was written")
        manifest = json.loads(text)
        if manifest["key"] != key or manifest["format"] != FORMAT:
            raise Broken("its manifest is that of another entry")
        try:
            data = _owned(self.folder / f"{key}.bin")
        except FileNotFoundError:
            raise Broken("its object is missing") from None
        if manifest["sha256"] != _sha256(data).decode():
            raise Broken("its object is not what was written")
        if arch is not None and manifest["arch"] != arch:
            raise Broken(f"it is for {manifest['arch']}, not {arch}")
        if (why := foreign(data, manifest["arch"])) is not None:
            raise Broken(why)
        return Entry(manifest, data)

    def put(self, key: str, data: bytes, manifest: dict[str, Any]) -> Entry:
        """Writes an entry; `manifest` holds at least "arch".

        Raises:
            Broken: the object is for another architecture.
            OSError: the folder cannot be written.
        """
        if (why := foreign(data, manifest["arch"])) is not None:
            raise Broken(why)
        whole = {"key": key, "format": FORMAT, "sha256": _sha256(data).decode(), **manifest}
        text = json.dumps(whole, sort_keys=True).encode()
        self._replace(self.folder / f"{key}.bin", data)
        self._replace(self._manifest(key), _sha256(text) + b"\n" + text)
        return Entry(whole, data)

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Holds the lock of a key, against other processes too; none where none can be made."""
        path = self.folder / "locks" / key
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as e:
            _LOG.info("no lock in %s: %s", self.folder, e)
            yield
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def names(self) -> list[str]:
        """Keys of every entry, broken ones too."""
        return sorted({p.stem for end in ("json", "bin") for p in self.folder.glob(f"*.{end}")})

    def remove(self, key: str) -> None:
        """Removes an entry, however broken."""
        for path in (self._manifest(key), self.folder / f"{key}.bin"):
            path.unlink(missing_ok=True)

    def _manifest(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _replace(self, path: Path, data: bytes) -> None:
        handle, name = tempfile.mkstemp(dir=self.folder, prefix=".new-")
        try:
            with os.fdopen(handle, "wb") as f:
                f.write(data)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


def opened() -> Cache | None:
    """The cache of this process, or None where there is none; why not is logged once."""
    folder = settings.cache_dir()
    return None if folder is None else _usable(folder)


@lru_cache(maxsize=16)
def _usable(folder: Path) -> Cache | None:
    cache = Cache(folder)
    if (why := cache.trouble()) is None:
        return cache
    _LOG.warning("no compiled kernel is kept: %s", why)
    return None


def foreign(data: bytes, arch: str) -> str | None:
    """Why an object is not code for an architecture, or None: looks at the cubins in it."""
    found = [_cubin_arch(data[m.start() : m.start() + 64]) for m in _CUBIN.finditer(data)]
    if not found:
        return "it holds no code for a GPU"
    number = int(arch.removeprefix("sm_").removesuffix("a"))
    if any(n != number for n in found):
        return f"it holds code for sm_{found[0]}, not {arch}"
    return None


def _cubin_arch(header: bytes) -> int:
    """Architecture of a cubin's ELF header: low byte of the flags, second byte from ABI 8 on."""
    flags = int.from_bytes(header[48:52], "little")
    return flags >> 8 & 0xFF if header[8] >= 8 else flags & 0xFF


def _owned(path: Path) -> bytes:
    """The bytes of a file that nobody else can have written."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    with os.fdopen(handle, "rb") as f:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in (0, os.geteuid()):
            raise Broken(f"{path.name} belongs to uid {found.st_uid}")
        if found.st_mode & 0o022:
            raise Broken(f"{path.name} can be written by others")
        return f.read()


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).hexdigest().encode()
