"""Compiles the CuTe kernel of a Config: the tensors it expects, and no tensor."""

import cutlass.cute as cute
from cutlass import Float32, Int16, Int32

from cutemoe.gdn.cute_delta import GatedDelta
from cutemoe.gdn.cute_plan import Config
from cutemoe.gdn.cute_rows import TYPES
from cutemoe.gdn.cute_step import GatedDeltaStep


def build(c: Config, options: str = ""):
    """The launchable kernel; see `GatedDelta.__call__` for its arguments.

    Launches go to the current stream of torch. `options` are further ones of cute.compile.
    """
    s = cute.sym_int
    B, T, HQ, HV, DV, P = s(), s(), s(), s(), s(), s()
    kernel = GatedDeltaStep(c) if c.tile == 1 else GatedDelta(c)
    io, dt = TYPES[c.io], TYPES[c.state]
    _, vo, _, rec = c.wide
    row = (DV, c.dk) if c.layout == "vk" else (c.dk, DV)
    qk_align = kernel.alignment(0, io)
    inputs = (
        _fake(io, (B, T, HQ, c.dk), qk_align),
        _fake(io, (B, T, HQ, c.dk), qk_align),
        _fake(io, (B, T, HV, DV), kernel.alignment(1, io)),
        _fake(io, (B, T, HV, DV), kernel.alignment(1, io)),
    )
    shapes = ((B, T, HV), (B, T, HV), (HV,), (HV,))
    gates = tuple(_strided(TYPES[d], sh) for d, sh in zip(c.gates, shapes))
    state = _fake(dt, (P, HV, *row), kernel.alignment(2, dt))
    snaps = _fake(dt, (B, s(), HV, *row), kernel.alignment(2, dt)) if c.snapshots else None
    if c.targets:
        snaps = _strided(TYPES[c.targets], (B, T))
    index = _strided(TYPES[c.index], (B,)) if c.index else None
    draft = accepted = None
    if c.record:
        W = s()
        key = TYPES[c.record]
        draft = (
            _fake(Float32, (P, W, HV, DV), 16 if vo else 4),
            _fake(key, (P, 2, W, HQ, c.dk), 16 if rec else key.width // 8),
            _fake(Float32, (P, 2, W, HQ), 4),
            _fake(Float32, (P, 2, W, HV), 4),
            _fake(Int16, (P, HV, DV), 2),
        )
        accepted = _strided(TYPES[c.accepted], (B,))
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    return cute.compile(
        kernel, inputs, gates, state, index, snaps, draft, accepted,
        Float32(1.0), Int32(1), Int32(1), stream, options=f"--enable-tvm-ffi {options}".strip(),
    )  # fmt: skip


def _fake(dtype, shape, align):
    """A tensor with any strides but a contiguous last dimension, its rows `align` bytes apart."""
    div = max(align * 8 // dtype.width, 1)
    stride = (*(cute.sym_int64(divisibility=div) for _ in shape[:-1]), 1)
    return cute.runtime.make_fake_tensor(dtype, shape, stride=stride, assumed_align=align)


def _strided(dtype, shape):
    stride = tuple(cute.sym_int64() for _ in shape)
    return cute.runtime.make_fake_tensor(
        dtype, shape, stride=stride, assumed_align=dtype.width // 8
    )
