"""Compiles the Hopper kernel of a Config: the tensors it expects, and no tensor."""

import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32, Int64, Uint8

from cutemoe.gemm.cute_gemm import ExpertGemm
from cutemoe.gemm.cute_plan import Config

TYPES = {"bf16": BFloat16, "fp16": Float16, "fp32": Float32, "fp8": Uint8}


def build(c: Config, options: str = ""):
    """The launchable kernel; see `ExpertGemm.__call__` for its arguments.

    Launches go to the current stream of torch. `options` are further ones of cute.compile.
    """
    s = cute.sym_int
    K, E, N, R, T = s(), s(), s(), s(), s()
    x = _rows(TYPES[c.recipe.activations], (s(), K), 16)
    w = _packed(Uint8, (E, s(), s(), c.recipe.unit), 16)
    factor = _packed(Float32, (E,), 4) if c.factor else None
    x_scale = {"none": None, "row": (s(),), "expert": (E,)}[c.x_scale]
    x_scale = None if x_scale is None else _packed(Float32, x_scale, 4)
    bias = _packed(Float32, (E, s()), 4) if c.bias else None
    slots = _packed(Int32, (R,), 4) if c.gather or c.scatter else None
    work = (slots, _packed(Int32, (T, 3), 4), _packed(Int32, (1,), 4))
    if c.ids:
        kind = {"int32": Int32, "int64": Int64}[c.ids]
        work = (_rows(kind, (s(), s()), kind.width // 8), Int64(0))
    out = _rows(TYPES[c.out], (s(), N), TYPES[c.out].width // 8)
    params = tuple(_packed(Float32, (E,), 4) if p else Float32(0.0) for p in c.params)
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(
        ExpertGemm(c), x, w, factor, x_scale, bias, work, out, params, Int32(1), Int32(1), stream,
        options=f"--enable-tvm-ffi {options}".strip(),
    )  # fmt: skip


def _packed(dtype, shape, align):
    """A contiguous tensor."""
    return cute.runtime.make_fake_compact_tensor(
        dtype, shape, stride_order=tuple(reversed(range(len(shape)))), assumed_align=align
    )


def _rows(dtype, shape, align):
    """A tensor whose rows are contiguous and `align` bytes apart."""
    stride = (cute.sym_int64(divisibility=max(align * 8 // dtype.width, 1)), 1)
    return cute.runtime.make_fake_tensor(dtype, shape, stride=stride, assumed_align=align)
