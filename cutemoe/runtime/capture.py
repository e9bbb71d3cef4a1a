"""A launch that another launcher makes, read from a stream that is being captured.

CuTe DSL launches through code of its own, which takes 6 to 10 us from Python where the driver needs
4 (H200, 2026-11-30). What it gives the driver is known once a launch was captured: the function,
sizes, attributes and the bytes of the parameters, in which the addresses of tensors are found by
their values. Nothing runs while a stream is captured.

Two launches are captured: that the second may start before the first is done (programmatic
dependent launch) shows in the edge between them and nowhere else.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from typing import Any

import torch

from cutemoe.runtime import driver
from cutemoe.runtime.driver import Launch

_LOG = logging.getLogger(__name__)
# of cuda.h: a kind of stream, a mode of capturing, types of a node and an edge, attributes
_NON_BLOCKING = 1
_RELAXED = 2
_KERNEL = 0
_PROGRAMMATIC = 1
_COOPERATIVE, _CLUSTER, _CARVEOUT = 2, 4, 14


class _Node(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("sizes", ctypes.c_uint * 7),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    )


def distinct(values: Any) -> list[torch.Tensor]:
    """The tensors in nested lists and tuples, each once."""
    if isinstance(values, torch.Tensor):
        return [values]
    found: dict[int, torch.Tensor] = {}
    if isinstance(values, (list, tuple)):
        for part in values:
            found |= {id(t): t for t in distinct(part)}
    return list(found.values())


def launch_of(kernel: Callable[..., None], args: tuple[Any, ...]) -> Launch | None:
    """The launch of kernel(*args), which is not made; None where it cannot be read."""
    lib, stream = driver.library(), ctypes.c_void_p()
    # of its own: another thread may launch to any of torch's
    if lib.cuStreamCreate(ctypes.byref(stream), _NON_BLOCKING):
        return None
    try:
        graph = _captured(lib, stream, lambda: kernel(*args))
    except Exception as e:  # whatever a launcher does that must not be captured
        _LOG.warning("launches of %s are not recorded: %s", kernel, e)
        return None
    finally:
        lib.cuStreamDestroy_v2(stream)
    if graph is None:
        return None
    try:
        return _read(lib, graph, kernel, distinct(args))
    except AttributeError:  # a driver without one of the functions
        return None
    finally:
        lib.cuGraphDestroy(graph)


def _captured(lib: Any, stream: ctypes.c_void_p, launch: Callable[[], None]) -> Any:
    """The graph of two launches, or None."""
    graph = ctypes.c_void_p()
    with torch.cuda.stream(torch.cuda.ExternalStream(stream.value)):
        if lib.cuStreamBeginCapture_v2(stream, _RELAXED):
            return None
        try:
            launch()
            launch()
        finally:
            failed = lib.cuStreamEndCapture(stream, ctypes.byref(graph))
    return None if failed else graph


def _read(lib: Any, graph: Any, kernel: Any, tensors: list[torch.Tensor]) -> Launch | None:
    found = _last_of_two(lib, graph)
    if found is None:
        return None
    node, early = found
    x = _Node()
    if lib.cuGraphKernelNodeGetParams_v2(node, ctypes.byref(x)) or not x.parameters:
        return None
    function = ctypes.c_void_p(x.function)
    if not x.function and lib.cuKernelGetFunction(
        ctypes.byref(function), ctypes.c_void_p(x.kernel)
    ):
        return None
    attributes = _attributes(lib, node)
    if attributes is None:
        return None
    parameters = _parameters(lib, function, x.parameters)
    addresses = _addresses(parameters, tensors)
    if addresses is None:
        return None
    early_launch = [driver.EARLY] if early else []
    # the kernel owns the function
    return Launch(
        function, tuple(x.sizes), parameters, addresses, (*attributes, *early_launch), kernel
    )


def _last_of_two(lib: Any, graph: Any) -> tuple[Any, bool] | None:
    """The second of two kernels in a row, and whether it need not wait for the first."""
    count = ctypes.c_size_t(2)
    sources, targets = (ctypes.c_void_p * 2)(), (ctypes.c_void_p * 2)()
    data = (ctypes.c_ubyte * 16)()
    if lib.cuGraphGetNodes(graph, None, ctypes.byref(count)) or count.value != 2:
        return None
    if lib.cuGraphGetEdges_v2(graph, sources, targets, data, ctypes.byref(count)):
        return None
    node, kind = ctypes.c_void_p(targets[0]), ctypes.c_int()
    if count.value != 1 or lib.cuGraphNodeGetType(node, ctypes.byref(kind)):
        return None
    return (node, data[2] == _PROGRAMMATIC) if kind.value == _KERNEL else None


def _attributes(lib: Any, node: Any) -> tuple[bytes, ...] | None:
    """What a launch has to be told besides; None where it is more than a carveout."""
    found = []
    for number in (_COOPERATIVE, _CLUSTER, _CARVEOUT):
        value = (ctypes.c_int * 16)()
        if lib.cuGraphKernelNodeGetAttribute(node, number, value):
            continue
        if number == _CARVEOUT:
            found.append(driver.attribute(number, value[0]))
        elif value[0] > (number == _CLUSTER):
            return None
    return tuple(found)


def _parameters(lib: Any, function: Any, values: Any) -> bytes:
    """The parameters as they lie in memory."""
    found, number = bytearray(), 0
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    where = ctypes.byref(offset), ctypes.byref(size)
    while lib.cuFuncGetParamInfo(function, ctypes.c_size_t(number), *where) == 0:
        found += bytes(offset.value - len(found)) + ctypes.string_at(values[number], size.value)
        number += 1
    return bytes(found)


def _addresses(
    parameters: bytes, tensors: list[torch.Tensor]
) -> tuple[tuple[int, tuple[torch.Tensor, ...]], ...] | None:
    """Where addresses are, and of which tensors; None where that of a tensor is missing."""
    wanted: dict[int, tuple[torch.Tensor, ...]] = {}
    for t in tensors:
        # an empty tensor has none
        if address := t.data_ptr():
            wanted[address] = (*wanted.get(address, ()), t)
    words = memoryview(parameters[: len(parameters) // 8 * 8]).cast("Q")
    found = tuple((8 * i, wanted[word]) for i, word in enumerate(words) if word in wanted)
    return found if len({t[0].data_ptr() for _, t in found}) == len(wanted) else None
