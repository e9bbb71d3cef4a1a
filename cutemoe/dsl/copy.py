# pyright: reportAttributeAccessIssue=false
"""Asynchronous copies to shared memory by address, and matrices from there to registers."""

import cutlass.cute as cute
from cutlass import Uint32


def copy_async(to, source, nbytes, live):
    """`nbytes` (4, 8 or 16) from a global address to a shared one; zeros where not live.

    `to` and `source` are multiples of nbytes. Nothing is read where not live.
    """
    cache = "cg" if nbytes == 16 else "ca"
    size = Uint32(live) * Uint32(nbytes)
    cute.arch.inline_ptx(
        f"cp.async.{cache}.shared.global [{{$r0}}], [{{$r1}}], {nbytes}, {{$r2}};",
        read_only_args=[to, source, size],
    )


def matrices(address):
    """Four 8 x 8 matrices of 16 bits: lanes 8 i .. 8 i + 7 give the rows of matrix i."""
    return cute.arch.inline_ptx(
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Uint32] * 4,
        read_only_args=[address],
    )


def shared_words(address):
    """Four 32-bit words of shared memory, from a multiple of 16 bytes on."""
    return cute.arch.inline_ptx(
        "ld.shared.v4.u32 {{$w0}, {$w1}, {$w2}, {$w3}}, [{$r0}];",
        write_only_types=[Uint32] * 4,
        read_only_args=[address],
    )


def put_words(address, words):
    """Stores four 32-bit words in shared memory, from a multiple of 16 bytes on."""
    cute.arch.inline_ptx(
        "st.shared.v4.u32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[address, *words]
    )


def put_word(address, word):
    """Stores a 32-bit word in shared memory."""
    cute.arch.inline_ptx("st.shared.u32 [{$r0}], {$r1};", read_only_args=[address, word])


def shared_word(address):
    """A 32-bit word of shared memory."""
    return cute.arch.inline_ptx(
        "ld.shared.u32 {$w0}, [{$r0}];", write_only_types=[Uint32], read_only_args=[address]
    )
