"""Copies to shared memory and predicated stores, in PTX."""

import cutlass
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


def fence_async():
    """What this thread sees of memory, its bulk copies see from here on."""
    _do("fence.proxy.async;", "", ())


def copy_16(dst, src, nbytes, left, least):
    """16 bytes to dst, of which nbytes come from global memory and the rest are zeros; nothing
    unless left > least, a number."""
    _do(
        f"{{\n.reg .pred p;\nsetp.gt.s32 p, $3, {least};\n"
        "@p cp.async.cg.shared.global.L2::128B [$0], [$1], 16, $2;\n}",
        "r,l,r,r",
        (Int32(dst), Int64(src), Int32(nbytes), Int32(left)),
    )


_PACK = {"bf16": "cvt.rn.bf16x2.f32", "fp16": "cvt.rn.f16x2.f32"}


def store_pair(kind, at, offset, values, left, least):
    """Two Float32 as `kind` to the global addresses of two rows, `offset` bytes behind `at`: the
    first if left > least, a number, and the second if left > least + 1."""
    if kind == "fp32":
        body = f"@p st.global.f32 [$0+{offset}], $2;\n@q st.global.f32 [$1+{offset}], $3;\n"
    else:
        body = (
            f".reg .b32 v;\n.reg .b16 lo, hi;\n{_PACK[kind]} v, $3, $2;\nmov.b32 {{lo, hi}}, v;\n"
            f"@p st.global.b16 [$0+{offset}], lo;\n@q st.global.b16 [$1+{offset}], hi;\n"
        )
    _do(
        f"{{\n.reg .pred p, q;\nsetp.gt.s32 p, $4, {least};\nsetp.gt.s32 q, $4, {least + 1};\n"
        f"{body}}}",
        "l,l,f,f,r",
        (*map(Int64, at), *values, Int32(left)),
    )


def tile_start(base, first, expert, tile, nbytes):
    """Address of a tile of layout sm90_tokens whose groups of 8 rows have so many bytes."""
    return base + Int64(first // 8 + cutlass.min(expert, tile)) * nbytes


@cute.jit
def advance(stage, phase, stages):
    """The stage and phase after these in a pipeline of `stages`, as every role counts them."""
    stage += 1
    if stage == stages:
        stage = Int32(0)
        phase ^= 1
    return stage, phase
