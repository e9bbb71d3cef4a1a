"""The time no kernel can beat: fewest bytes over measured bandwidth, operations over measured rate.

Pure arithmetic over workloads and ceilings; ceilings.py measures the latter.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from workloads import GDNWorkload, GemmWorkload, MoEWorkload

# bits a weight, with its share of the block scales; dense and int4 depend on arguments
_CODE_BITS = {"mxfp4": 4, "nvfp4": 4, "int4": 4, "fp8": 8, "bf16": 16}
_SCALE_BITS = {"mxfp4": 8, "nvfp4": 8, "int4": 16}
_GROUP = {"mxfp4": 32, "nvfp4": 16, "int4": 128}


@dataclass(frozen=True)
class Ceilings:
    """Rates measured in the run that uses them.

    Attributes:
        read_tb_s, copy_tb_s: streaming read; copy counting bytes read and written.
        bf16_tflop_s, fp8_tflop_s: 8192^3 products on random data; fp8 None where there is none.
        node_us: one empty kernel inside a CUDA graph.
    """

    read_tb_s: float
    copy_tb_s: float
    bf16_tflop_s: float
    fp8_tflop_s: float | None
    node_us: float

    def rounded(self) -> dict[str, float | None]:
        """The rates by name, four significant digits."""
        values = dataclasses.asdict(self)
        return {name: None if v is None else float(f"{v:.4g}") for name, v in values.items()}


@dataclass(frozen=True)
class Work:
    """What a call cannot avoid: bytes read once, bytes written once, operations."""

    read_bytes: float
    write_bytes: float
    flops: float
    fp8: bool = False

    @property
    def nbytes(self) -> float:
        """Bytes moved."""
        return self.read_bytes + self.write_bytes


def weight_bits(weights: str, group_size: int | None = None) -> float:
    """Bits one weight takes in memory with its share of the block scale."""
    if weights not in _SCALE_BITS:
        return float(_CODE_BITS[weights])
    return _CODE_BITS[weights] + _SCALE_BITS[weights] / (group_size or _GROUP[weights])


def expected_distinct(experts: int, top_k: int, tokens: int) -> float:
    """Mean number of experts that at least one of the tokens chooses, under uniform routing."""
    return experts * (1.0 - (1.0 - top_k / experts) ** tokens)


def expert_bytes(w: MoEWorkload) -> float:
    """Bytes of one expert's two weights, scales included."""
    return 3 * w.hidden * w.intermediate * weight_bits(w.weights, w.group_size) / 8


def moe_work(w: MoEWorkload, tokens: int, distinct: float) -> Work:
    """Work of one layer call: the weights of the experts really drawn, and both products."""
    flops = 6.0 * tokens * w.top_k * w.hidden * w.intermediate
    return Work(distinct * expert_bytes(w), 0.0, flops, w.activations == "fp8")


def group_bytes(w: GemmWorkload) -> float:
    """Bytes of one group's weight, scales included."""
    return w.n * w.k * weight_bits(w.weights, w.group_size) / 8


def gemm_work(w: GemmWorkload, tokens: int, distinct: float) -> Work:
    """Work of one grouped GEMM: the weights of the groups that have rows, and the product."""
    flops = 2.0 * tokens * w.top_k * w.n * w.k
    return Work(distinct * group_bytes(w), 0.0, flops, w.activations == "fp8")


def state_bytes(w: GDNWorkload) -> int:
    """Bytes of one sequence's state."""
    return w.v_heads * w.head_dim**2 * (4 if w.state == "float32" else 2)


def gdn_work(w: GDNWorkload, sequences: int, accepted: float = 0.0) -> Work:
    """Work of one call: states, snapshots, and q, k, v, o, gates of every token.

    A verify reads the state once and folds nothing in this count; it reads the recorded k, u, g of
    the accepted tokens of the last window (`accepted` is their mean) and records T new ones.
    """
    s = state_bytes(w)
    inputs = w.tokens * ((2 * w.q_heads + w.v_heads) * w.head_dim * 2 + 2 * w.v_heads * 2)
    outputs = w.tokens * w.v_heads * w.head_dim * 2
    # a recorded token, u in bfloat16 and the log decay in float32, as small as a draft can be
    row = (w.q_heads + w.v_heads) * w.head_dim * 2 + 4 * w.v_heads
    read, write = s + inputs, outputs
    if w.mode == "verify":
        read, write = read + accepted * row, write + w.tokens * row
    if w.mode in ("decode", "snapshots+update"):
        write += s
    if w.mode in ("snapshots", "snapshots+update"):
        write += w.tokens * s
    flops = 8.0 * w.tokens * w.v_heads * w.head_dim**2
    return Work(sequences * float(read), sequences * float(write), sequences * flops)


def memory_us(work: Work, c: Ceilings) -> float:
    """Microseconds to move the bytes; what is written, and as much read, goes at the copy rate."""
    paired = min(work.read_bytes, work.write_bytes)
    mixed = work.write_bytes + paired
    return (work.read_bytes - paired) / c.read_tb_s / 1e6 + mixed / c.copy_tb_s / 1e6


def floor_us(work: Work, c: Ceilings, matrix: bool) -> float:
    """Microseconds no call can beat; `matrix` says that the operations are matrix products."""
    memory = memory_us(work, c)
    if not matrix:
        return memory
    rate = c.fp8_tflop_s if work.fp8 and c.fp8_tflop_s else c.bf16_tflop_s
    return max(memory, work.flops / rate / 1e6)
