"""A CUDA driver that captures and launches nothing: it writes down what it is given."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch

from cutemoe.runtime import driver

PDL, COOPERATIVE, CLUSTER, CARVEOUT = 6, 2, 4, 14


class Launched(NamedTuple):
    """What reached the driver; attributes by number."""

    function: int
    sizes: tuple[int, ...]
    stream: int
    parameters: bytes
    attributes: dict[int, int]


def launched(config: Any, function: Any, extra: Any) -> Launched:
    """What the arguments of cuLaunchKernelEx say."""
    raw = config.raw if hasattr(config, "raw") else ctypes.string_at(config.value, 56)
    *sizes, stream, at, number = struct.unpack("@7IPPI4x", raw)
    attributes = {}
    for i in range(number):
        name, value, rest = struct.unpack("@I4xi60s", ctypes.string_at(at + 72 * i, 72))
        assert rest == bytes(60)
        attributes[name] = value
    words = ctypes.cast(extra, ctypes.POINTER(ctypes.c_size_t))
    assert [words[0], words[2], words[4]] == [1, 2, 0]
    size = ctypes.c_size_t.from_address(words[3]).value
    found = ctypes.string_at(words[1], size)
    return Launched(function.value, tuple(sizes), stream, found, attributes)


@dataclass
class Node:
    """A captured launch."""

    function: int
    sizes: tuple[int, ...]
    parameters: list[bytes]
    attributes: dict[int, int]
    kept: list[Any] = field(default_factory=list)


class FakeDriver:
    """Kernels call `submit`; a stream that is captured makes nodes of that."""

    def __init__(self) -> None:
        self.launches: list[Launched] = []
        self.nodes: list[Node] | None = None
        self.graph: list[Node] = []
        self.destroyed = 0
        self.streams = 0
        self.refuses: set[str] = set()

    def submit(
        self, function: int, sizes: tuple[int, ...], parameters: Sequence[bytes],
        attributes: dict[int, int],
    ) -> None:  # fmt: skip
        """A launch as another launcher makes it."""
        if self.nodes is not None:
            self.nodes.append(Node(function, sizes, list(parameters), dict(attributes)))
            return
        self.launches.append(Launched(function, sizes, 5, joined(parameters)[0], attributes))

    def cuLaunchKernelEx(self, config, function, params, extra) -> int:
        assert params is None
        self.launches.append(launched(config, function, extra))
        return 0

    def cuStreamCreate(self, stream, flags) -> int:
        assert flags == 1
        self.streams += 1
        stream._obj.value = 7
        return 0

    def cuStreamDestroy_v2(self, stream) -> int:
        assert stream.value == 7 and self.nodes is None
        self.streams -= 1
        return 0

    def cuStreamBeginCapture_v2(self, stream, mode) -> int:
        assert stream.value == 7 and mode == 2 and self.nodes is None
        if "begin" in self.refuses:
            return 1
        self.nodes = []
        return 0

    def cuStreamEndCapture(self, stream, graph) -> int:
        assert self.nodes is not None
        self.graph, self.nodes = self.nodes, None
        graph._obj.value = 99
        return 0

    def cuGraphDestroy(self, graph) -> int:
        self.destroyed += 1
        return 0

    def cuGraphGetNodes(self, graph, nodes, count) -> int:
        assert graph.value == 99 and nodes is None
        count._obj.value = len(self.graph)
        return 0

    def cuGraphGetEdges_v2(self, graph, sources, targets, data, count) -> int:
        if "edges" in self.refuses:
            raise AttributeError("cuGraphGetEdges_v2")
        sources[0], targets[0] = 1, 2
        data[2] = self.graph[1].attributes.get(PDL, 0)
        count._obj.value = 1
        return 0

    def cuGraphNodeGetType(self, node, kind) -> int:
        kind._obj.value = 1 if "kernels" in self.refuses else 0
        return 0

    def cuGraphKernelNodeGetParams_v2(self, node, params) -> int:
        found, x = self.graph[node.value - 1], params._obj
        buffers = [ctypes.create_string_buffer(p, len(p)) for p in found.parameters]
        pointers = (ctypes.c_void_p * len(buffers))(*map(ctypes.addressof, buffers))
        found.kept += [buffers, pointers]
        x.function = found.function
        x.sizes[:] = found.sizes
        x.parameters = ctypes.cast(pointers, ctypes.POINTER(ctypes.c_void_p))
        return 0

    def cuGraphKernelNodeGetAttribute(self, node, number, value) -> int:
        found = self.graph[node.value - 1].attributes
        if number not in found:
            return 1
        value[0] = found[number]
        return 0

    def cuFuncGetParamInfo(self, function, number, offset, size) -> int:
        parameters = next(n for n in self.graph if n.function == function.value).parameters
        if number.value >= len(parameters):
            return 1
        offset._obj.value = joined(parameters)[1][number.value]
        size._obj.value = len(parameters[number.value])
        return 0


def joined(parameters: Sequence[bytes]) -> tuple[bytes, list[int]]:
    """Parameters behind one another, those of 8 bytes and more aligned to 8; where they lie."""
    found, offsets = bytearray(), []
    for p in parameters:
        found += bytes(-len(found) % (8 if len(p) >= 8 else 4))
        offsets.append(len(found))
        found += p
    return bytes(found), offsets


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    """Instead of the driver, and of torch's streams."""

    found = FakeDriver()
    monkeypatch.setattr(driver, "library", lambda: found)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda address: address)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 5 + index, False)
    yield found
    assert found.streams == 0 and found.nodes is None
