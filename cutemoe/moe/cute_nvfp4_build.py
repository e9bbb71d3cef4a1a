"""Compiles the kernels of an FP4 layer: the tensors they expect, and no tensor.

Launches go to the current stream of torch. `options` are further ones of cute.compile.
"""

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint8

from cutemoe.moe.cute_nvfp4_fc1 import FC1
from cutemoe.moe.cute_nvfp4_fc2 import FC2
from cutemoe.moe.cute_nvfp4_fused import Fused
from cutemoe.moe.cute_nvfp4_left import DTYPES
from cutemoe.moe.cute_nvfp4_plan import (
    GROUP,
    FC2Config,
    FusedConfig,
    GemmConfig,
    RowsConfig,
    SortConfig,
)
from cutemoe.moe.cute_nvfp4_rows import Quantise
from cutemoe.moe.cute_nvfp4_sort import Sort

IDS = {"int32": Int32, "int64": Int64}


def build_sort(c: SortConfig, options: str = ""):
    """The launchable kernel; see `Sort.__call__` for its arguments."""
    n = cute.sym_int
    ids = _rows(IDS[c.ids], (n(), n()), IDS[c.ids].width // 8)
    rows = (*_sorted(), _list(Int32))
    return _compile(Sort(c), options, ids, rows, _list(Int32), *[Int32(1)] * 3)


def build_quantise(c: RowsConfig, options: str = ""):
    """The launchable kernel; see `Quantise.__call__` for its arguments."""
    T, H, K, R = (cute.sym_int() for _ in range(4))
    return _compile(
        Quantise(c),
        options,
        _rows(DTYPES[c.dtype], (T, H), 16 if c.wide else 2),
        _rows(IDS[c.ids], (T, K), IDS[c.ids].width // 8),
        _list(Int32, R),
        _list(Int32),
        _list(Float32) if c.group == GROUP["nvfp4"] else None,
        _rows(Int32, (R, cute.sym_int(divisibility=c.group // 8)), c.group // 2),
        _rows(Uint8, (R, cute.sym_int(divisibility=4)), 4),
        Int32(0),
    )


def build_fc1(c: GemmConfig, options: str = ""):
    """The launchable kernel; see `FC1.__call__` for its arguments."""
    R, n = cute.sym_int(), cute.sym_int
    operands, multipliers, bias = _gemm(c, R)
    params = _params(c)
    if c.numbers:
        operands = (_x(c), Int32(1), *operands[2:])
        result = (_numbers(c, R),)
    else:
        result = (_rows(Int32, (R, n()), 4), _rows(Uint8, (R, n(divisibility=4)), 4))
    if multipliers is not None:
        multipliers = (*multipliers, _list(Float32) if c.scaled else None)
    return _compile(
        FC1(c), options, operands, _tiles(R), multipliers, bias, params, result, Int32(1)
    )


def build_fc2(c: FC2Config, options: str = ""):
    """The launchable kernel; see `FC2.__call__` for its arguments."""
    R = cute.sym_int()
    operands, multipliers, bias = _gemm(c.gemm, R)
    y, numbers = _y(), (Int32(0), Int32(1), Int32(1))
    call, sync = _out(c.rows), _list(Int32)
    return _compile(
        FC2(c), options, operands, _tiles(R), multipliers, bias, y, call, sync, numbers, Int32(1)
    )


def build_fused(c: FusedConfig, options: str = ""):
    """The launchable kernel; see `Fused.__call__` for its arguments."""
    T, H, K, R = (cute.sym_int() for _ in range(4))
    x = _rows(DTYPES[c.quantise.dtype], (T, H), 16 if c.quantise.wide else 2)
    call = (x, *_out(c.fc2.rows, T, H, K), _y())
    if c.fc1.numbers:
        xq, mid = None, (_numbers(c.fc1, R),)
    else:
        xq, mid = _codes(R, c.fc1.vector), _codes(R, c.fc2.gemm.vector)
    of_x, m1, b1 = _gemm(c.fc1, R)
    of_mid, m2, b2 = _gemm(c.fc2.gemm, R)
    (f1, d1), (f2, d2) = m1 or (None, None), m2 or (None, None)
    w13 = (*of_x[2:], f1, d1, d2, b1, _params(c.fc1))
    w2 = (*of_mid[2:], f2, b2)
    rows = (_list(Int32, R), *_sorted()[1:], _list(Int32))
    numbers = (Int32(0), Int32(1), Int32(1), Int32(1))
    return _compile(
        Fused(c), options, call, rows, xq, w13, mid, w2, _list(Int32), numbers, Int32(1)
    )


def _out(c: RowsConfig, T=None, H=None, K=None):
    """ids, weights and out."""
    T, H, K = (cute.sym_int() if n is None else n for n in (T, H, K))
    return (
        _rows(IDS[c.ids], (T, K), IDS[c.ids].width // 8),
        _rows(Float32, (T, K), 4),
        _rows(DTYPES[c.dtype], (T, H), 8 if c.wide else 2),
    )


def _y():
    """Parts of the FC2 output."""
    return _rows(Float32, (cute.sym_int(), cute.sym_int(divisibility=16)), 16)


def _x(c: GemmConfig):
    """x as FC1 takes it in numbers."""
    shape = (cute.sym_int(), cute.sym_int(divisibility=16))
    return _rows(DTYPES[c.numbers], shape, 16 if c.wide else 2)


def _numbers(c: GemmConfig, R):
    """R rows of numbers of this package's making."""
    return _rows(DTYPES[c.numbers], (R, cute.sym_int(divisibility=16)), 16)


def _codes(R, vector):
    """Codes and scales of R rows: as bytes, and as words."""
    n = cute.sym_int
    return (
        _rows(Uint8, (R, n()), vector),
        _rows(Uint8, (R, n(divisibility=4)), 4),
        _rows(Int32, (R, n(divisibility=vector // 4)), vector),
        _rows(Int32, (R, n()), 4),
    )


def _params(c: GemmConfig):
    """alpha, beta and limit: lists or numbers."""
    return tuple(
        _list(Float32) if each else Float32(1.0) for each in (c.alpha_e, c.beta_e, c.limit_e)
    )


def _gemm(c: GemmConfig, R):
    """Operands, multipliers and bias of a GEMM over R sorted rows."""
    E, N, width, words = (cute.sym_int() for _ in range(4))
    if c.numbers:
        left = (_numbers(c, R), None)
    else:
        left = (_rows(Uint8, (R, width), c.vector), _rows(Int32, (R, words), 4))
    operands = (
        *left,
        _rows(Uint8, (E, N, width), c.vector),
        _rows(Int32, (E, cute.sym_int()), 16),
    )
    multipliers = None
    if c.scaled:
        multipliers = (_list(Float32, E) if c.factor else None, _list(Float32, E))
    elif c.numbers and c.factor:
        multipliers = (_list(Float32, E), None)
    return operands, multipliers, _rows(Float32, (E, N), 4) if c.bias else None


def _sorted():
    """Sorted slots, starts and tiles."""
    return _list(Int32), _list(Int32), _rows(Int32, (cute.sym_int(), 3), 4)


def _tiles(R):
    return _rows(Int32, (cute.sym_int(), 3), 4), _list(Int32), _list(Int32, R)


def _list(dtype, n=None):
    n = cute.sym_int() if n is None else n
    return cute.runtime.make_fake_tensor(dtype, (n,), stride=(1,), assumed_align=dtype.width // 8)


def _rows(dtype, shape, align):
    """A tensor with any strides but a contiguous last dimension, its rows `align` bytes apart."""
    div = max(align * 8 // dtype.width, 1)
    stride = (*(cute.sym_int64(divisibility=div) for _ in shape[:-1]), 1)
    return cute.runtime.make_fake_tensor(dtype, shape, stride=stride, assumed_align=align)


def _compile(kernel, options, *args):
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(kernel, *args, stream, options=f"--enable-tvm-ffi {options}".strip())
