"""Objects that look like code for a GPU to the cache: an ELF header, then bytes."""

import random


def cubin(arch: int, size: int = 4096, seed: int = 0) -> bytes:
    """A cubin's header for an architecture, as ptxas of CUDA 13 writes it, and random bytes."""
    header = bytearray(64)
    header[:9] = b"\x7fELF\x02\x01\x01\x41\x08"
    header[16:20] = b"\x02\x00\xbe\x00"
    header[48:52] = bytes((4, arch, 0, 6))
    return bytes(header) + random.Random(seed).randbytes(size)


def old_cubin(arch: int) -> bytes:
    """The same as CUDA 12 writes it."""
    header = bytearray(cubin(arch, 0))
    header[7:9], header[48:52] = b"\x33\x07", bytes((arch, 5, arch, 0))
    return bytes(header)
