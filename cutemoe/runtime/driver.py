"""Loads cubins and launches their kernels through the CUDA driver's C functions.

Decision: ctypes, and parameters packed by one `struct` call into a block that each thread has: 1.7
us a launch without the driver's own time (two CPU cores, 2026-11). Rejected: a launcher in C, for
which a machine that serves models would need a compiler.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

# of cuda.h: attributes of a function and of a device, a preference, keys of a launch's extra words
_MAX_DYNAMIC_SHARED, _STATIC_SHARED = 8, 1
_SHARED_OPTIN = 97
_PREFER_SHARED = 1
_END, _BUFFER_POINTER, _BUFFER_SIZE = 0, 1, 2
_INVALID_CONTEXT = 201
_USUAL_SHARED = 49152
_MOST_BYTES = 4096
# where the size of the parameters stands in a thread's block of words; they follow it
SIZE_AT = 56
# CUlaunchConfig: grid, block, shared memory, stream, attributes and their number
_CONFIG = struct.Struct("@7IPPI4x")
# of a Block, which word is the stream, and where the parameters start
STREAM, PARAMETERS = 4, 13


def attribute(number: int, value: int) -> bytes:
    """CUlaunchAttribute; a value has 64 bytes."""
    return struct.pack("@I4xi60x", number, value)


# programmatic stream serialization, allowed
EARLY = attribute(6, 1)


class Launch(NamedTuple):
    """Everything that the driver is told of a launch.

    Attributes:
        function: of `load`.
        sizes: of the grid and of a block, three each, and bytes of shared memory.
        parameters: as they lie in memory.
        addresses: of every address in them, where it is and which tensors start there.
        attributes: what `attribute` makes.
        owner: what has to stay alive.
    """

    function: ctypes.c_void_p
    sizes: tuple[int, ...]
    parameters: bytes
    addresses: tuple[tuple[int, tuple[torch.Tensor, ...]], ...]
    attributes: tuple[bytes, ...] = ()
    owner: Any = None


class Block:
    """A launch in memory, as cuLaunchKernelEx takes it.

    Attributes:
        words: CUlaunchConfig, five words that point to the parameters, their size, they themselves.
        given: arguments of cuLaunchKernelEx.
    """

    def __init__(self, launch: Launch) -> None:
        count = PARAMETERS + -(-len(launch.parameters) // 8)
        memory = bytearray(8 * count) + b"".join(launch.attributes)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        at = base + 8 * count if launch.attributes else 0
        _CONFIG.pack_into(memory, 0, *launch.sizes, 0, at, len(launch.attributes))
        self.words = memoryview(memory).cast("Q")
        first = base + 8 * PARAMETERS
        self.words[7:PARAMETERS] = memoryview(
            struct.pack("@6N", _BUFFER_POINTER, first, _BUFFER_SIZE, first - 8, _END,
                        len(launch.parameters))
        ).cast("Q")  # fmt: skip
        memory[8 * PARAMETERS : 8 * PARAMETERS + len(launch.parameters)] = launch.parameters
        config, extra = ctypes.c_void_p(base), ctypes.c_void_p(base + 56)
        self.given = config, launch.function, None, extra


class _Block(threading.local):
    """The words a launch of this thread points to: five pairs of keys and values, parameters."""

    def __init__(self) -> None:
        self.config = ctypes.create_string_buffer(_CONFIG.size)
        self.early = ctypes.create_string_buffer(EARLY, len(EARLY))
        self.attributes = ctypes.addressof(self.early)
        self.words = ctypes.create_string_buffer(SIZE_AT + 8 + _MOST_BYTES)
        base = ctypes.addressof(self.words)
        self.extra = ctypes.c_void_p(base)
        keys = (_BUFFER_POINTER, base + SIZE_AT + 8, _BUFFER_SIZE, base + SIZE_AT, _END)
        for i, word in enumerate(keys):
            ctypes.c_size_t.from_buffer(self.words, 8 * i).value = word


_BLOCK = _Block()


@lru_cache(maxsize=1)
def library() -> Any:
    """The driver's functions."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as e:
        raise RuntimeError(
            f"the CUDA driver's libcuda.so.1 does not load ({e}); install NVIDIA's driver, or "
            "start the container with GPU access"
        ) from e


def load(cubin: bytes, name: str, shared: int, index: int) -> ctypes.c_void_p:
    """The function `name` of a cubin on a device, ready for launches with `shared` bytes.

    Raises:
        RuntimeError: what the driver says.
    """
    # a thread without a context gets that of the device
    torch.cuda.set_device(index)
    lib, what = library(), f"loading {name}"
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check(lib.cuModuleLoadData(ctypes.byref(module), cubin), what)
    _check(lib.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), what)
    if shared > _USUAL_SHARED:
        optin, static = ctypes.c_int(), ctypes.c_int()
        _check(lib.cuDeviceGetAttribute(ctypes.byref(optin), _SHARED_OPTIN, index), what)
        if shared > optin.value:
            raise RuntimeError(f"{name} needs {shared} bytes of shared memory, got {optin.value}")
        _check(lib.cuFuncSetCacheConfig(function, _PREFER_SHARED), what)
        _check(lib.cuFuncGetAttribute(ctypes.byref(static), _STATIC_SHARED, function), what)
        most = optin.value - static.value
        _check(lib.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, most), what)
    return function


def launch(
    function: ctypes.c_void_p,
    grid: tuple[int, ...],
    threads: int,
    shared: int,
    index: int,
    pack: Any,
    values: tuple[Any, ...],
    pdl: bool = False,
) -> None:
    """Launches on torch's current stream of a device; does not wait.

    Args:
        pack: `pack_into` of a struct: the size of the parameters, then the parameters.
        pdl: programmatic dependent launch: the kernel itself waits for the one before it.
    """
    block = _BLOCK
    pack(block.words, SIZE_AT, *values)
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    if not (x and y and z):
        return
    stream = torch._C._cuda_getCurrentRawStream(index)
    # no argtypes: converting by them costs 0.8 us a launch
    if pdl:
        sizes = (x, y, z, threads, 1, 1, shared)
        _CONFIG.pack_into(block.config, 0, *sizes, stream, block.attributes, 1)
        run, call = library().cuLaunchKernelEx, (block.config, function, None, block.extra)
    else:
        rest = (shared, ctypes.c_void_p(stream), None, block.extra)
        run, call = library().cuLaunchKernel, (function, x, y, z, threads, 1, 1, *rest)
    if code := run(*call):
        again(run, call, code, index, f"a launch of {x} x {y} x {z} programs of {threads} threads")


def again(
    run: Callable[..., int], call: Sequence[Any], code: int, index: int, what: str = "a launch"
) -> None:
    """What follows a launch that the driver answered with `code`: a thread may need a context.

    Raises:
        RuntimeError: what the driver says.
    """
    if code == _INVALID_CONTEXT:
        torch.cuda.set_device(index)
        code = run(*call)
    _check(code, what)


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        library().cuGetErrorString(code, ctypes.byref(text))
        said = (text.value or b"unknown").decode()
        hint = "; the driver is older than the compiler" if code in (200, 209, 222) else ""
        raise RuntimeError(f"CUDA error {code} in {what}: {said}{hint}")
