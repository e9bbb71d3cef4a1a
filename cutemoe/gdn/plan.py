"""Which back end runs a gated delta net call, and with which tile."""

from __future__ import annotations

from dataclasses import dataclass

from cutemoe.gdn import cute_plan
from cutemoe.gdn.problem import Problem
from cutemoe.runtime.backend import Backend, never, triton_unavailable
from cutemoe.runtime.compile import cute_unavailable
from cutemoe.runtime.device import Device

MAX_HEAD = 512
# torch adds up other numbers in another order
EAGER_HEAD = 128


@dataclass(frozen=True)
class GDNConfig:
    """The tile of one program, a warp: rows of a state, cut into chunks of columns.

    The lanes on a row, and so the order of every sum, depend on DK, the dtype of the state, the
    layout and the alignment of rows alone: rows have the same bits whatever the batch and the
    number of rows in a tile.

    Attributes:
        block_v: rows of a tile.
        rows: rows a chunk spreads over the lanes.
        block_k: columns of a chunk.
        vector: contiguous columns of a lane, 1 where the state's rows are contiguous ("kv").
    """

    block_v: int
    rows: int
    block_k: int
    vector: int


def refuse_triton(problem: Problem, device: Device) -> str | None:
    """The Triton kernels keep whole rows in the registers of one warp."""
    if problem.rounding == "eager":
        return refuse_eager(problem)
    most = MAX_HEAD if problem.layout == "vk" else MAX_HEAD // 2
    keys = problem.DK
    if keys > most:
        return f"DK <= {most} in layout {problem.layout!r}, got {keys}"
    return None


def refuse_eager(problem: Problem) -> str | None:
    """Why the kernel with torch's roundings does not run a problem, or None."""
    if (problem.DK, problem.DV) != (EAGER_HEAD, EAGER_HEAD):
        sizes = f"{problem.DK} and {problem.DV}"
        return f"DK = DV = {EAGER_HEAD} with rounding 'eager', got {sizes}"
    if problem.state != "float32":
        return f"float32 states with rounding 'eager', got {problem.state}"
    if problem.gates != "given":
        return "g and beta with rounding 'eager', got a, b, A_log, dt_bias"
    if problem.snapshots or problem.scattered:
        return "no states after each token with rounding 'eager'"
    return None


def configure(problem: Problem, device: Device) -> GDNConfig:
    """The tile for a problem: 16 rows of 128 columns, or 8 where programs are few.

    H200, HV=32, B = 1 / 64, 8 and 16 rows, us: float32 T=4 with snapshots 6.9/178 and 6.5/179,
    update only 5.7/89 and 6.0/86, verification 7.5/122 and 8.3/106.
    """
    columns = _power_of_2(problem.DK)
    wide = 4 if problem.state == "float32" else 8
    if problem.layout == "kv":
        block_v = min(max(2048 // columns, 4), 16)
        return GDNConfig(block_v, block_v, min(16, columns), 1)
    few = 256 * device.sm_count >= problem.B * problem.HV * problem.DV
    small = (few and not (problem.snapshots or problem.scattered)) or problem.dtype == "float32"
    cells = 1024 if small else 2048
    vector = min(wide, columns)
    block_k = min(64, columns)
    rows = 32 * vector // block_k
    return GDNConfig(max(min(cells // columns, 32), rows), rows, block_k, vector)


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


CUTE = Backend(
    "cute", "cutemoe.gdn.cute_launch:run", cute_unavailable, cute_plan.refuse, cute_plan.configure,
    replays=True,
)  # fmt: skip
DECODE = (
    CUTE,
    Backend("triton", "cutemoe.triton_kernels.gdn:run", triton_unavailable, refuse_triton,
            configure, replays=True),
    Backend("reference", "cutemoe.gdn.reference:gdn_decode", never, never),
)  # fmt: skip
VERIFY = (
    CUTE,
    Backend("triton", "cutemoe.triton_kernels.gdn_verify:run", triton_unavailable, refuse_triton,
            configure, replays=True),
    Backend("reference", "cutemoe.gdn.reference:gdn_verify", never, never),
)  # fmt: skip
