"""Where bytes sit: invertible layouts of kernels, and tensors as checkpoints store them.

A layout moves bytes and knows no values. `LAYOUTS` holds those of kernels; `CHECKPOINTS` turns the
tensors of a checkpoint into a `QuantizedTensor` and back.
"""

from cutemoe.layouts.checkpoint import Checkpoint
from cutemoe.layouts.compressed_tensors import COMPRESSED_TENSORS
from cutemoe.layouts.experts import join_rows, stack_experts
from cutemoe.layouts.gate_up import INTERLEAVED, ORDERS, UP_GATE, reorder
from cutemoe.layouts.gpt_oss import GPT_OSS
from cutemoe.layouts.int4_packed import INT4_PACKED
from cutemoe.layouts.layout import Layout
from cutemoe.layouts.modelopt import MODELOPT
from cutemoe.layouts.rows import ROWS
from cutemoe.layouts.sm120_block_scale import SM120_BLOCK_SCALE

LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (ROWS, UP_GATE, INTERLEAVED, SM120_BLOCK_SCALE)
}
CHECKPOINTS: dict[str, Checkpoint] = {
    c.name: c for c in (GPT_OSS, MODELOPT, INT4_PACKED, COMPRESSED_TENSORS)
}

__all__ = [
    "CHECKPOINTS",
    "LAYOUTS",
    "ORDERS",
    "Checkpoint",
    "Layout",
    "join_rows",
    "reorder",
    "stack_experts",
]
