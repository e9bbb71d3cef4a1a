# pyright: reportAttributeAccessIssue=false, reportCallIssue=false
"""One step of a block-scaled MMA as a kernel: a warp, its registers from and to memory."""

from __future__ import annotations

from dataclasses import dataclass

import cuda.bindings.driver as cuda
import cutlass.cute as cute
from cutlass import Float32, Uint32, range_constexpr

from cutemoe.dsl.mma import mxfp4_mma


@dataclass(frozen=True)
class Step:
    """arch: target; half: of the scale words."""

    arch: int
    half: int = 0


class Mxfp4Step:
    """c [4, 32] += A B for a [4, 32], b [2, 32], scales [2, 32] of registers by lanes."""

    def __init__(self, c: Step):
        self.policy, self.half = mxfp4_mma(c.arch), c.half

    @cute.jit
    def __call__(self, mA, mB, mS, mC, stream: cuda.CUstream):
        self.kernel(mA, mB, mS, mC).launch(grid=[1, 1, 1], block=[32, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, mA, mB, mS, mC):
        lane = cute.arch.lane_idx()
        acc = cute.make_rmem_tensor((4,), Float32)
        for i in range_constexpr(4):
            acc[i] = mC[i, lane]
        a = self.policy.a([mA[i, lane] for i in range(4)], mS[0, lane], self.half)
        b = self.policy.b([mB[i, lane] for i in range(2)], mS[1, lane], self.half)
        self.policy.mma(acc, a, b)
        for i in range_constexpr(4):
            mC[i, lane] = acc[i]


def build(c: Step, options: str = ""):
    """The launchable kernel."""

    def registers(dtype, n):
        return cute.runtime.make_fake_tensor(dtype, (n, 32), stride=(32, 1), assumed_align=4)

    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    args = [registers(Uint32, n) for n in (4, 2, 2)] + [registers(Float32, 4)]
    return cute.compile(Mxfp4Step(c), *args, stream, options=f"--enable-tvm-ffi {options}".strip())
