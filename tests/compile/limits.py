"""Registers and local memory a CuTe kernel may use, by the release of the DSL that compiles it.

Limits are those of 4.8. The ptxas of an older release is another: 4.7.1 brings that of CUDA 13.3 in
place of 13.4. What it may use more stands here, measured on every kernel of the tests.
"""

from __future__ import annotations

import importlib.metadata

# by rows of a tile: for sm_120a 106 registers in place of 92, 148 in place of 128, and 168 in place
# of 160 with copies of 8 bytes; one CTA an SM either way, which has 83 KB of shared memory
_MORE_REGISTERS = {"4.7": {16: 2, 64: 12}}
# sort_slots of flat ids for sm_120a alone; verification that asks for 12 warps an SM; a flush; FC1
# of four warpgroups
_LOCAL_BYTES = {
    "4.7": {
        "sort": 8,
        "verify, long window sm_90a": 32,
        "flush sm_120a": 8,
        "int4 x fp8, 48 rows": 8,
    },
}


def release() -> str:
    """Major and minor number of the DSL that compiles, such as "4.8"."""
    return ".".join(importlib.metadata.version("nvidia-cutlass-dsl").split(".")[:2])


def more_registers(block_m: int) -> int:
    """What the installed DSL may use on top of the registers of 4.8."""
    return _MORE_REGISTERS.get(release(), {}).get(block_m, 0)


def local_bytes(kernel: str) -> int:
    """Bytes of local memory a thread of a kernel may use."""
    return _LOCAL_BYTES.get(release(), {}).get(kernel, 0)
