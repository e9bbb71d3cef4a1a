"""What reaches the CUDA driver, seen by a driver that only writes it down."""

from __future__ import annotations

import ctypes
import struct
import threading
from typing import Any

import pytest
import torch

from cutemoe.runtime import driver


class Library:
    """Answers every call with `code`; keeps the parameters of launches."""

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self.calls: list[tuple[Any, ...]] = []
        self.codes: list[int] = []
        self.optin = 232448
        self.early = 0

    def cuLaunchKernel(self, function, *numbers) -> int:
        grid, block, (shared, stream, params, extra) = numbers[:3], numbers[3:6], numbers[6:]
        return self.launched(function, grid, block, shared, stream.value, params, extra)

    def cuLaunchKernelEx(self, config, function, params, extra) -> int:
        *sizes, stream, attributes, number = struct.unpack("@7IPPI4x", config.raw)
        assert number == 1 and ctypes.string_at(attributes, 72) == bytes(
            [6, *[0] * 7, 1, *[0] * 63]
        )
        self.early += 1
        sizes = tuple(sizes)
        return self.launched(function, sizes[:3], sizes[3:6], sizes[6], stream, params, extra)

    def launched(self, function, grid, block, shared, stream, params, extra) -> int:
        words = ctypes.cast(extra, ctypes.POINTER(ctypes.c_size_t))
        assert params is None and [words[0], words[2], words[4]] == [1, 2, 0]
        size = ctypes.c_size_t.from_address(words[3]).value
        found = ctypes.string_at(words[1], size)
        self.launches.append(
            {"function": function.value, "grid": grid, "block": block, "shared": shared,
             "stream": stream, "bytes": found}
        )  # fmt: skip
        return self.codes.pop(0) if self.codes else 0

    def cuGetErrorString(self, code, text) -> int:
        text._obj.value = b"what the driver says"
        return 0

    def cuDeviceGetAttribute(self, value, attribute, index) -> int:
        assert attribute == 97
        value._obj.value = self.optin
        return 0

    def cuFuncGetAttribute(self, value, attribute, function) -> int:
        assert attribute == 1
        value._obj.value = 48
        return 0

    def cuModuleGetFunction(self, function, module, name) -> int:
        self.calls.append(("function", name))
        function._obj.value = 77
        return 0

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.calls.append((name, *args)) or 0


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    fake = Library()
    monkeypatch.setattr(driver, "library", lambda: fake)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: fake.calls.append(("set", index)))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 5 + index, False)
    return fake


LAYOUT = struct.Struct("@NPifqP")
VALUES = (LAYOUT.size - 8, 2**40, -3, 0.5, -(2**33), 0)


def start(grid: tuple[int, ...] = (7,), pdl: bool = False) -> None:
    driver.launch(ctypes.c_void_p(2**45), grid, 128, 1024, 1, LAYOUT.pack_into, VALUES, pdl)


@pytest.mark.parametrize(
    ("grid", "whole"), [((7,), (7, 1, 1)), ((7, 2), (7, 2, 1)), ((7, 2, 3), (7, 2, 3))]
)
@pytest.mark.parametrize("pdl", [False, True])
def test_a_launch(
    library: Library, grid: tuple[int, ...], whole: tuple[int, ...], pdl: bool
) -> None:
    start(grid, pdl)
    assert library.early == pdl
    (seen,) = library.launches
    assert seen["grid"] == whole and seen["block"] == (128, 1, 1) and seen["shared"] == 1024
    assert seen["function"] == 2**45 and seen["stream"] == 6
    # a C struct of pointer, int, float, long long, pointer
    assert struct.unpack("@PifqP", seen["bytes"]) == VALUES[1:]


def test_nothing_is_launched_for_an_empty_grid(library: Library) -> None:
    start((7, 0))
    assert library.launches == []


def test_a_thread_without_a_context_gets_one(library: Library) -> None:
    library.codes = [201, 0]
    start()
    assert len(library.launches) == 2 and library.calls == [("set", 1)]


def test_an_error_says_what_the_driver_says(library: Library) -> None:
    library.codes = [700]
    with pytest.raises(RuntimeError, match=r"CUDA error 700 in a launch of 7 x 1 x 1.*driver says"):
        start()


def test_every_thread_has_its_own_parameters(library: Library) -> None:
    places: list[int] = []

    def note() -> None:
        places.append(ctypes.addressof(driver._BLOCK.words))

    threads = [threading.Thread(target=note) for _ in range(2)]
    for t in threads:
        t.start()
        t.join()
    note()
    assert places[2] not in places[:2]


def test_a_kernel_with_much_shared_memory_is_allowed_it(library: Library) -> None:
    function = driver.load(b"cubin", "name", 100_000, 0)
    assert function.value == 77 and library.calls[0] == ("set", 0)
    assert ("function", b"name") in library.calls
    names = [call[0] for call in library.calls]
    assert names.index("cuFuncSetCacheConfig") < names.index("cuFuncSetAttribute")
    assert library.calls[-1][2:] == (8, 232448 - 48)
    library.calls.clear()
    driver.load(b"cubin", "name", 49152, 0)
    assert "cuFuncSetAttribute" not in [call[0] for call in library.calls]
    with pytest.raises(RuntimeError, match="needs 300000 bytes of shared memory, got 232448"):
        driver.load(b"cubin", "name", 300_000, 0)


def test_no_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    driver.library.cache_clear()
    monkeypatch.setattr(driver.ctypes, "CDLL", missing)
    with pytest.raises(RuntimeError, match="install NVIDIA's driver"):
        driver.library()
