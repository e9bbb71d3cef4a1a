"""Measures the rates of this machine, in the run that needs them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
from collections.abc import Callable, Iterable

import torch
from measure import Timer, percentile
from roofline import Ceilings

READ_BYTES = 4 << 30
MATMUL = 8192
NODES = 100
REPEATS = 15

Body = Callable[[], object]


def measure_ceilings(
    timer: Timer,
    device: torch.device,
    *,
    read_bytes: int = READ_BYTES,
    matmul: int = MATMUL,
    repeats: int = REPEATS,
) -> Ceilings:
    """Read and copy bandwidth, matrix rates and the cost of an empty graph node."""

    def fastest(bodies: Iterable[Body]) -> float | None:
        return min((_median(timer, body, repeats) for body in bodies), default=None)

    x = torch.ones(read_bytes // 4, dtype=torch.float32, device=device)
    read, copy = fastest(readers(x)), fastest(copiers(x))
    a, b = (torch.randn(matmul, matmul, device=device).to(torch.bfloat16) for _ in range(2))
    bf16, fp8 = fastest([lambda: a @ b]), fastest(scaled_products(a, b))
    one = torch.zeros(1, device=device)
    nodes = fastest([lambda: [one.add_(1.0) for _ in range(NODES)]])
    if read is None or copy is None or bf16 is None or nodes is None:
        raise RuntimeError("no way to measure a ceiling")
    flops = 2.0 * matmul**3
    return Ceilings(
        read_tb_s=x.nbytes / read / 1e6,
        copy_tb_s=x.nbytes / copy / 1e6,
        bf16_tflop_s=flops / bf16 / 1e6,
        fp8_tflop_s=flops / fp8 / 1e6 if fp8 else None,
        node_us=nodes / NODES,
    )


def _median(timer: Timer, body: Body, repeats: int) -> float:
    """Microseconds of one body."""

    def run() -> None:
        body()

    replay = timer.capture(run)
    timer.time(replay)
    return percentile([timer.time(replay) for _ in range(repeats)], 0.5)


def readers(x: torch.Tensor) -> Iterable[Body]:
    """Ways to read all of x once: the fastest is the ceiling."""
    yield x.sum
    if x.device.type == "cuda" and importlib.util.find_spec("triton"):
        for block, unroll in itertools.product((2048, 4096), (1, 4)):
            yield streaming(x, block, unroll, 8 if block == 4096 else 4)


def streaming(x: torch.Tensor, block: int, unroll: int, warps: int) -> Body:
    """Sums of consecutive blocks, by a Triton kernel."""
    stream = importlib.import_module("stream")
    programs = x.numel() // (block * unroll)
    out = torch.empty(programs, dtype=torch.float32, device=x.device)

    def body() -> torch.Tensor:
        stream.sum_blocks[(programs,)](x, out, block, unroll, num_warps=warps)
        return out

    return body


def copiers(x: torch.Tensor) -> Iterable[Body]:
    """Ways to read one half of x and write the other."""
    target, source = x.chunk(2)
    yield lambda: target.copy_(source)
    yield lambda: torch.neg(source, out=target)


def scaled_products(a: torch.Tensor, b: torch.Tensor) -> Iterable[Body]:
    """a @ b in fp8 through torch, or nothing where this machine has none."""
    one = torch.ones((), device=a.device)
    qa = a.to(torch.float8_e4m3fn)
    qb = b.to(torch.float8_e4m3fn).T.contiguous().T

    def body() -> torch.Tensor:
        dtype = torch.bfloat16
        return torch.ops.aten._scaled_mm(qa, qb, one, one, out_dtype=dtype, use_fast_accum=True)

    with contextlib.suppress(RuntimeError, NotImplementedError, AttributeError, TypeError):
        body()
        yield body
