"""The cache on disk: whatever is not exactly what was written is compiled again."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from cutemoe.runtime import cache as module
from cutemoe.runtime import compile as compiling
from cutemoe.runtime.cache import Broken, Cache, foreign
from tests.runtime.objects import cubin, old_cubin

ARCH = "sm_90a"
KEY = "ab" * 32


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "kept"
    cache = Cache(folder)
    assert cache.trouble() is None
    return cache


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A cache of this process, in a fresh folder."""
    folder = tmp_path / "here"
    monkeypatch.setenv("CUTEMOE_CACHE_DIR", str(folder))
    monkeypatch.delenv("CUTEMOE_NO_JIT", raising=False)
    return folder


def stored(cache: Cache, seed: int = 0) -> bytes:
    data = cubin(90, seed=seed)
    cache.put(KEY, data, {"arch": ARCH, "parts": ["a", "b"]})
    return data


def test_what_is_written_is_read(cache):
    data = stored(cache)
    entry = cache.get(KEY, ARCH)
    assert entry is not None and entry.data == data
    assert entry.manifest["parts"] == ["a", "b"] and cache.names() == [KEY]
    assert cache.get("cd" * 32, ARCH) is None
    modes = [p.stat().st_mode & 0o777 for p in (cache.folder, *cache.folder.iterdir())]
    assert modes[0] == 0o700 and set(modes[1:]) == {0o600}


def test_a_second_write_replaces_the_first(cache):
    stored(cache)
    data = stored(cache, seed=1)
    assert cache.read(KEY).data == data
    assert not list(cache.folder.glob(".new-*"))


def flipped(data: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


def zeroed(data: bytes, draw: random.Random) -> bytes:
    """A page of zeros, as a crash of the machine leaves one; where it changes anything."""
    at, length = draw.randrange(len(data)), draw.choice((1, 64, 4096))
    found = data[:at] + bytes(len(data[at : at + length])) + data[at + length :]
    return found if found != data else flipped(data, draw)


DAMAGE = {
    "flipped": flipped,
    "zeroed": zeroed,
    "truncated": lambda data, draw: data[: draw.randrange(len(data))],
    "extended": lambda data, draw: data + draw.randbytes(draw.randrange(1, 64)),
    "of another": lambda data, draw: draw.randbytes(len(data)),
}


@pytest.mark.parametrize("seed", range(100))
def test_damage_is_found_and_compiled_again(here, seed):
    """A hundred random corruptions of either file, each found and each repaired."""
    draw = random.Random(seed)
    built = []

    def make():
        built.append(seed)
        return cubin(90, 512, seed), {"kernel": "k"}

    first = compiling.fetch("k", (str(seed),), ARCH, make)
    (path,) = here.glob(draw.choice(("*.bin", "*.json")))
    damage = list(DAMAGE)[seed % len(DAMAGE)]
    whole = path.read_bytes()
    path.write_bytes(DAMAGE[damage](whole, draw))
    assert path.read_bytes() != whole
    again = compiling.fetch("k", (str(seed),), ARCH, make)
    assert built == [seed, seed] and again.data == first.data
    third = compiling.fetch("k", (str(seed),), ARCH, make)
    assert built == [seed, seed] and third.data == first.data


def test_a_missing_object_is_found(cache):
    stored(cache)
    (cache.folder / f"{KEY}.bin").unlink()
    with pytest.raises(Broken, match="its object is missing"):
        cache.read(KEY)


def test_an_entry_under_another_key_is_found(cache):
    stored(cache)
    other = "cd" * 32
    for end in ("bin", "json"):
        (cache.folder / f"{KEY}.{end}").rename(cache.folder / f"{other}.{end}")
    with pytest.raises(Broken, match="another entry"):
        cache.read(other)


@pytest.mark.parametrize("make", [cubin, old_cubin])
def test_code_for_another_architecture_is_found(cache, make):
    assert foreign(make(90), ARCH) is None
    assert foreign(b"host code" + make(90) + b"more", ARCH) is None
    assert "sm_80" in (foreign(make(80), ARCH) or "")
    assert "no code" in (foreign(b"\x7fELF host code only", ARCH) or "")
    with pytest.raises(Broken, match="sm_80"):
        cache.put(KEY, make(80), {"arch": ARCH})
    cache.put(KEY, make(90), {"arch": ARCH})
    with pytest.raises(Broken, match="it is for sm_90a, not sm_120a"):
        cache.read(KEY, "sm_120a")
    assert cache.get(KEY, "sm_120a") is None


def give_away(path: Path, monkeypatch) -> None:
    """Makes a file somebody else's."""
    if os.geteuid() == 0:
        os.chown(path, 4321, -1)
    else:
        mine = os.geteuid()
        monkeypatch.setattr(module.os, "geteuid", lambda: mine + 1)


@pytest.mark.parametrize("end", ["bin", "json"])
def test_a_file_of_another_user_is_found(cache, monkeypatch, end):
    stored(cache)
    give_away(cache.folder / f"{KEY}.{end}", monkeypatch)
    with pytest.raises(Broken, match="belongs to uid"):
        cache.read(KEY)


@pytest.mark.parametrize("end", ["bin", "json"])
def test_a_file_others_can_write_is_found(cache, end):
    stored(cache)
    (cache.folder / f"{KEY}.{end}").chmod(0o666)
    with pytest.raises(Broken, match="can be written by others"):
        cache.read(KEY)


def test_a_link_is_not_followed(cache, tmp_path):
    stored(cache)
    path = cache.folder / f"{KEY}.bin"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert cache.get(KEY, ARCH) is None


def test_a_folder_others_can_write_is_refused(here):
    here.mkdir(mode=0o777)
    here.chmod(0o777)
    assert "chmod 700" in (Cache(here).trouble() or "")
    module._usable.cache_clear()
    assert module.opened() is None
    built = []

    def make():
        built.append(1)
        return cubin(90), {"kernel": "k"}

    for _ in range(2):
        compiling.fetch("k", ("refused",), ARCH, make)
    assert built == [1, 1] and not list(here.iterdir())


def test_a_folder_of_another_user_is_refused(here, monkeypatch):
    here.mkdir(mode=0o700)
    give_away(here, monkeypatch)
    assert "belongs to uid" in (Cache(here).trouble() or "")


def test_a_folder_that_cannot_be_made_says_what_to_do(tmp_path):
    (tmp_path / "file").write_text("")
    assert "set CUTEMOE_CACHE_DIR" in (Cache(tmp_path / "file" / "folder").trouble() or "")


def test_nothing_is_kept_where_the_folder_is_empty(monkeypatch):
    monkeypatch.setenv("CUTEMOE_CACHE_DIR", "")
    assert module.opened() is None


WRITER = """
import sys, time
from pathlib import Path
from cutemoe.runtime.compile import build_count, fetch
from tests.runtime.objects import cubin

def make():
    with open(sys.argv[1], "a") as f:
        f.write("compiled\\n")
    time.sleep(1.0)
    return cubin(90), {"kernel": "k"}

while not Path(sys.argv[2]).exists():
    time.sleep(0.001)
entry = fetch("k", ("two processes",), "sm_90a", make)
print(build_count(), len(entry.data))
"""


def test_two_processes_compile_once(here, tmp_path):
    log, start = tmp_path / "log", tmp_path / "start"
    preamble = (
        "import sys, types; tests = sys.modules['tests'] = types.ModuleType('tests'); "
        f"tests.__path__ = [{str(Path(__file__).parents[1])!r}]\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", preamble + WRITER, log, start],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "CUTEMOE_CACHE_DIR": str(here)},
        )
        for _ in range(2)
    ]
    start.touch()
    answers = sorted(p.communicate(timeout=120)[0].split()[0] for p in both)
    assert answers == ["0", "1"]
    assert log.read_text() == "compiled\n"


def test_what_cannot_be_written_is_used_all_the_same(here, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.Cache, "_replace", full)
    entry = compiling.fetch("k", ("full disk",), ARCH, lambda: (cubin(90), {"kernel": "k"}))
    assert entry.data == cubin(90)


def test_the_key_has_the_architecture_and_every_part(here):
    made = []

    def make():
        made.append(1)
        return cubin(90), {"kernel": "k"}

    for parts in (("a", "b"), ("ab",), ("a", "c"), ("a", "b")):
        compiling.fetch("k", parts, ARCH, make)
    assert len(made) == 3


def test_a_manifest_is_json_behind_its_digest(cache):
    stored(cache)
    digest, text = (cache.folder / f"{KEY}.json").read_text().split("\n")
    assert len(digest) == 64 and json.loads(text)["arch"] == ARCH


def test_a_compiler_that_aims_elsewhere_is_an_error(here):
    """As with CUTE_DSL_ARCH set to another card: nothing wrong is kept."""
    with pytest.raises(RuntimeError, match=r"sm_80, not sm_90a .*unset CUTE_DSL_ARCH"):
        compiling.fetch("k", ("elsewhere",), ARCH, lambda: (cubin(80), {"kernel": "k"}))
    assert not list(here.glob("*.bin"))
