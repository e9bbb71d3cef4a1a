"""Loads cubins and launches their kernels through the CUDA driver's C functions.

Decision: ctypes. A launch is one call with ten numbers, for which a C compiler (Triton's own
launcher) is much to ask of a machine that serves models.
"""

from __future__ import annotations

import ctypes
import threading
from functools import lru_cache
from typing import Any

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


class _Block(threading.local):
    """The words a launch of this thread points to: five pairs of keys and values, parameters."""

    def __init__(self) -> None:
        self.words = ctypes.create_string_buffer(SIZE_AT + 8 + _MOST_BYTES)
        base = ctypes.addressof(self.words)
        self.extra = ctypes.c_void_p(base)
        keys = (_BUFFER_POINTER, base + SIZE_AT + 8, _BUFFER_SIZE, base + SIZE_AT, _END)
        for i, word in enumerate(keys):
            ctypes.c_size_t.from_buffer(self.words, 8 * i).value = word


_BLOCK = _Block()


@lru_cache(maxsize=1)
def _library() -> Any:
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
    lib, what = _library(), f"loading {name}"
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
) -> None:
    """Launches on torch's current stream of a device; does not wait.

    Args:
        pack: `pack_into` of a struct: the size of the parameters, then the parameters.
    """
    block = _BLOCK
    pack(block.words, SIZE_AT, *values)
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    if not (x and y and z):
        return
    stream = ctypes.c_void_p(torch._C._cuda_getCurrentRawStream(index))
    # no argtypes: converting by them costs 0.8 us a launch
    numbers = (x, y, z, threads, 1, 1, shared, stream, None, block.extra)
    run = _library().cuLaunchKernel
    code = run(function, *numbers)
    if code == _INVALID_CONTEXT:
        torch.cuda.set_device(index)
        code = run(function, *numbers)
    if code:
        _check(code, f"a launch of {x} x {y} x {z} programs of {threads} threads")


def _check(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(code, ctypes.byref(text))
        said = (text.value or b"unknown").decode()
        hint = "; the driver is older than the compiler" if code in (200, 209, 222) else ""
        raise RuntimeError(f"CUDA error {code} in {what}: {said}{hint}")
