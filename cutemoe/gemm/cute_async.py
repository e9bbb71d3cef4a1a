"""Copies to shared memory that complete an mbarrier, in PTX: their sizes are known at run time."""

import cutlass.cute as cute
from cutlass import Int32, Int64
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op

# createpolicy.fractional.L2::evict_first, as the driver encodes it
_EVICT_FIRST = 0x12F0000000000000
_EVICT_NORMAL = 0x1000000000000000


@dsl_user_op
def _do(ptx, constraints, operands, *, loc=None, ip=None):
    llvm.inline_asm(
        None, [x.ir_value(loc=loc, ip=ip) for x in operands], ptx, constraints,
        has_side_effects=True, is_align_stack=False, asm_dialect=llvm.AsmDialect.AD_ATT,
        loc=loc, ip=ip,
    )  # fmt: skip


def bulk_copy(dst, src, nbytes, barrier, once):
    """nbytes (a multiple of 16) of global memory by one thread; `once`: nobody reads them again."""
    policy = Int64(_EVICT_FIRST if once else _EVICT_NORMAL)
    _do(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[$0], [$1], $2, [$3], $4;",
        "r,l,r,r,l",
        (Int32(dst), Int64(src), Int32(nbytes), Int32(barrier.toint()), policy),
    )


def copy_16(dst, src, nbytes):
    """16 bytes to dst, of which nbytes come from global memory and the rest are zeros."""
    _do(
        "cp.async.cg.shared.global.L2::128B [$0], [$1], 16, $2;",
        "r,l,r",
        (Int32(dst), Int64(src), Int32(nbytes)),
    )


@cute.jit
def advance(stage, phase, stages):
    """The stage and phase after these in a pipeline of `stages`, as every role counts them."""
    stage += 1
    if stage == stages:
        stage = Int32(0)
        phase ^= 1
    return stage, phase
