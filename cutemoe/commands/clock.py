"""What a GPU does in a microsecond: calls as a CUDA graph, and the rates that bound them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """Bytes a call must read and write, and operations of its matrix products."""

    read: float
    write: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Rates:
    """Measured ceilings: TB/s of a large read and of a copy (both ways), bf16 TFLOP/s."""

    read_tb_s: float
    copy_tb_s: float
    bf16_tflop_s: float

    def floor_us(self, work: Work) -> float:
        """Microseconds no call can beat; written bytes pair with read ones at the copy rate."""
        paired = min(work.read, work.write)
        memory = (work.read - paired) / self.read_tb_s + (work.write + paired) / self.copy_tb_s
        return max(memory, work.flops / self.bf16_tflop_s) / 1e6


class GraphClock:
    """Times calls captured in one CUDA graph.

    A large read before the first event hides the launch of the graph and empties L2 of the case's
    data; a write would leave lines that are flushed on the case's time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.curtain = torch.ones(1 << 28, dtype=torch.float32, device=device)
        self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def us(self, calls: Sequence[Call], repeats: int = 21) -> float:
        """Median microseconds of one call, each on the buffers it was made with."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for call in (*calls, *calls):
                call()
        torch.cuda.current_stream(self.device).wait_stream(side)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = [call() for call in calls]
        times = [self._replay(graph) for _ in range(repeats + 3)][3:]
        del kept
        return statistics.median(times) / len(calls)

    def _replay(self, graph: torch.cuda.CUDAGraph) -> float:
        start, end = self.events
        self.curtain.sum()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    def rates(self) -> Rates:
        """The ceilings of this card, now."""
        x = torch.ones(1 << 28, dtype=torch.float32, device=self.device)
        target, source = x.chunk(2)
        a, b = (torch.randn(8192, 8192, device=self.device).to(torch.bfloat16) for _ in range(2))
        read = min(self.us([call], 9) for call in (x.sum, lambda: x.view(-1, 8192).sum(1)))
        copies: tuple[Call, ...] = (
            lambda: target.copy_(source),
            lambda: torch.neg(source, out=target),
        )
        copy = min(self.us([call], 9) for call in copies)
        matmul = self.us([lambda: a @ b], 9)
        return Rates(x.nbytes / read / 1e6, x.nbytes / copy / 1e6, 2.0 * 8192**3 / matmul / 1e6)
