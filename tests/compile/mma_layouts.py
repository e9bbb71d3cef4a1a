"""Prints where the DSL's own block-scaled MMA has its operands: a JSON object of layouts.

    python mma_layouts.py        with CUTE_DSL_ARCH=sm_120a

A layout maps (lane, value) to row + rows * column of the operand.
"""

import json

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import warp
from cutlass.utils import blackwell_helpers

FOUND = {}


@cute.jit
def show():
    op = warp.MmaMXF4NVF4Op(cutlass.Float4E2M1FN, cutlass.Float32, cutlass.Float8E4M3FN)
    atom = cute.make_mma_atom(op)
    tiled = cute.make_tiled_mma(op, cute.make_layout((1, 1, 1)), permutation_mnk=(16, 8, 64))
    for name, layout in (
        ("A", atom.tv_layout_A),
        ("B", atom.tv_layout_B),
        ("C", atom.tv_layout_C),
        ("SFA", blackwell_helpers.get_layoutSFA_TV(tiled)),
        ("SFB", blackwell_helpers.get_layoutSFB_TV(tiled)),
    ):
        FOUND[name] = str(layout)


show()
print(json.dumps(FOUND))
