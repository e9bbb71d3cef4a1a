"""4-bit weights in the order in which 16-bit tensor cores of SM80 and newer read them.

Codes. Rows in groups of 8, K in blocks of 128 and, where K is no multiple of 128, one block each of
64, 32, 16 as needed. A block of 8 rows and 4 * step columns (step = 32, 16, 8, 4) is contiguous:
int16 [8, step]; the half-word in column c holds the codes of k = i * step + c, i = 0..3. So a
kernel that decodes the i-th code of 32 half-words has 32 neighbouring k, under one scale or two.

Bits. A pair of neighbouring half-words is one 32-bit word, and each of its four pairs of codes
shall reach the place where a 16-bit float wants them with as few shifts and masks as possible. For
e2m1 (sign s, magnitude e e m) that place is 15 | 8 7 | 6 in bf16, where the bits read as
code * 2^-126, and 15 | 11 10 | 9 in fp16, code * 2^-14. `own` names bits of the same half-word,
`other` of the neighbour, which a rotation of the word brings over. Codes of int4 stay nibbles.

Scales. One word for four codes a row and 16 or 32 columns, so that one load feeds four multipliers:

| weights | scale, N rounded up to 8 | meaning |
|---|---|---|
| mxfp4, bf16 | int32 [G, blocks, N, 1] | byte X_i: bf16 exponent of 2^126 * scale / 2^o, o per group in `factor` |
| mxfp4, fp16 | int32 [G, blocks, N, 1] | byte X_i: the e8m0 byte |
| nvfp4 | int32 [G, blocks, N, 2] | byte X_i: eeeee mmm of the scale, e = floor(log2) + 22, 0 is 0; word 1: columns 16..31 |
| int4 | float32 [G, blocks * 128 / group_size, N] | the scale |

The bytes of a word are rotated so that X_i << 7 is bits 14..7 of w, w >> 16, w >> 8, rotl(w, 8)
(nvfp4 for bf16: X_i << 4, bits 11..4).

Rejected: row-major codes (64 B a row and block; 2.9 TB/s of an H200's 4.6, measured 2026-11, where
this layout reaches 4.6), and blocks of 256 (more registers, no faster).
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass

import torch

from cutemoe.formats import QuantizedTensor, e2m1

BLOCK = 128
ROWS = 8
# codes packed at a time
CHUNK = 1 << 26


@dataclass(frozen=True)
class Bit:
    """Where a bit of a code sits: in which half-word of the pair, at which position."""

    position: int
    other: bool = False


def _own(*positions: int) -> tuple[Bit, ...]:
    return tuple(Bit(p) for p in positions)


# for i = 0..3 the bits m, e, e, s of code i
BITS = {
    "bf16": (
        _own(6, 7, 8, 15),
        _own(2, 3, 4, 11),
        (*_own(12, 13, 14), Bit(5, other=True)),
        (*_own(0, 9, 10), Bit(1, other=True)),
    ),
    "fp16": (
        _own(9, 10, 11, 15),
        (*_own(12, 13, 14), Bit(2, other=True)),
        (*_own(6, 7, 8), Bit(0, other=True)),
        (*_own(3, 4, 5), Bit(1, other=True)),
    ),
    "int4": tuple(_own(*range(4 * i, 4 * i + 4)) for i in range(4)),
}


# PTX for one word of "bf16": pairs of codes 0..3 of $4 where bf16 wants them, in $0..$3
PLACE_BF16 = """.reg .b32 t, u;
and.b32 $0, $4, 0x81C081C0;
shl.b32 t, $4, 4;
and.b32 $1, t, 0x81C081C0;
shf.r.wrap.b32 t, $4, $4, 6;
and.b32 $2, t, 0x81C081C0;
shf.r.wrap.b32 t, $4, $4, 2;
and.b32 t, t, 0x81808180;
shl.b32 u, $4, 6;
lop3.b32 $3, u, 0x00400040, t, 0xEA;
"""
# the same for "fp16", code * 2^-14
PLACE_FP16 = """.reg .b32 t, u;
and.b32 $0, $4, 0x8E008E00;
shf.r.wrap.b32 t, $4, $4, 3;
and.b32 $1, t, 0x8E008E00;
shf.r.wrap.b32 t, $4, $4, 1;
and.b32 t, t, 0x80008000;
shl.b32 u, $4, 3;
lop3.b32 $2, u, 0x0E000E00, t, 0xEA;
shf.r.wrap.b32 t, $4, $4, 2;
and.b32 t, t, 0x80008000;
shl.b32 u, $4, 6;
lop3.b32 $3, u, 0x0E000E00, t, 0xEA;
"""
# nibble n ^ 8 in the low mantissa bits of 128 or 1024 reads as 136 + n or 1032 + n
_NIBBLES = """.reg .b32 t, one, less;
mov.b32 one, {one};
mov.b32 less, {less};
lop3.b32 $0, $4, 0x000F000F, {magic}, 0x6A;
shr.u32 t, $4, 4;
lop3.b32 $1, t, 0x000F000F, {magic}, 0x6A;
shr.u32 t, $4, 8;
lop3.b32 $2, t, 0x000F000F, {magic}, 0x6A;
shr.u32 t, $4, 12;
lop3.b32 $3, t, 0x000F000F, {magic}, 0x6A;
fma.rn.{type} $0, $0, one, less;
fma.rn.{type} $1, $1, one, less;
fma.rn.{type} $2, $2, one, less;
fma.rn.{type} $3, $3, one, less;
"""
# PTX for one word of "int4": the values of codes 0..3
INT4_BF16 = _NIBBLES.format(one="0x3F803F80", less="0xC308C308", magic="0x43084308", type="bf16x2")
INT4_FP16 = _NIBBLES.format(one="0x3C003C00", less="0xE408E408", magic="0x64086408", type="f16x2")


def steps(k: int) -> tuple[int, ...]:
    """Columns of half-words of every block of a row of k codes, k a multiple of 16."""
    full, rest = divmod(k, BLOCK)
    tails = tuple(s for s in (16, 8, 4) if rest & (4 * s))
    return (32,) * full + tails


def padded(n: int) -> int:
    """n rounded up to whole groups of rows."""
    return -(-n // ROWS) * ROWS


def pack_codes(data: torch.Tensor, bits: str) -> torch.Tensor:
    """uint8 [G, N, K/2], low nibble first -> int16 [G, ceil(N/8), 2K], the codes in layout order.

    Rows beyond N hold zero codes. `bits` is "bf16", "fp16" or "int4".
    """
    groups, n, half = data.shape
    out = torch.zeros(groups, padded(n) // ROWS, 4 * half, dtype=torch.int16, device=data.device)
    chunk = max(1, CHUNK // max(1, n * half))
    for g in range(0, groups, chunk):
        code = e2m1.unpack(data[g : g + chunk]).to(torch.int32)
        code = torch.nn.functional.pad(code, (0, 0, 0, padded(n) - n)).unflatten(1, (-1, ROWS))
        start = 0
        for step in steps(2 * half):
            block = code[..., start : start + 4 * step].unflatten(-1, (4, step))
            words = place(block, bits).flatten(-2)
            out[g : g + chunk, :, 2 * start : 2 * (start + 4 * step)] = words
            start += 4 * step
    return out


def unpack_codes(packed: torch.Tensor, n: int, bits: str) -> torch.Tensor:
    """The inverse of `pack_codes`: int16 [G, ceil(N/8), 2K] -> uint8 [G, n, K/2]."""
    k = packed.shape[-1] // 2
    blocks, start = [], 0
    for step in steps(k):
        words = packed[..., 2 * start : 2 * (start + 4 * step)].unflatten(-1, (ROWS, step))
        blocks.append(lift(words.to(torch.int32), bits).flatten(-2))
        start += 4 * step
    code = torch.cat(blocks, -1).flatten(1, 2)[:, :n]
    return e2m1.pack(code.to(torch.uint8))


def place(code: torch.Tensor, bits: str) -> torch.Tensor:
    """The bits of codes where a word wants them: int32 [..., 4, step] -> int16 [..., step]."""
    word = torch.zeros_like(code[..., 0, :])
    for i, places in enumerate(BITS[bits]):
        for b, place in enumerate(places):
            bit = (code[..., i, :] >> b & 1) << place.position
            word |= _neighbour(bit) if place.other else bit
    return torch.where(word >= 1 << 15, word - (1 << 16), word).to(torch.int16)


def lift(word: torch.Tensor, bits: str) -> torch.Tensor:
    """The inverse of `place`: int32 half-words [..., 8, step] -> int32 codes [..., 8, 4, step]."""
    codes = []
    for places in BITS[bits]:
        code = torch.zeros_like(word)
        for b, place in enumerate(places):
            source = _neighbour(word) if place.other else word
            code |= (source >> place.position & 1) << b
        codes.append(code)
    return torch.stack(codes, -2)


def _neighbour(word: torch.Tensor) -> torch.Tensor:
    """Swaps columns 2j and 2j + 1."""
    return word.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def scale_index(k: int, group_size: int, words: int, device: torch.device) -> torch.Tensor:
    """Which scale of a row belongs to every (block, word, i); int64 [blocks, words, 4]."""
    index, start = [], 0
    for step in steps(k):
        for w in range(words):
            # columns of word 1 exist in blocks of 128 only; others repeat word 0
            column = w * 16 if step == 32 else 0
            index.append([(start + i * step + column) // group_size for i in range(4)])
        start += 4 * step
    return torch.tensor(index, device=device).view(-1, words, 4)


def pack_scales(
    bytes_: torch.Tensor, k: int, group_size: int, words: int, base: int
) -> torch.Tensor:
    """int32 bytes [G, N, K/group_size] -> int32 [G, blocks, N rounded up, words] of rotated bytes.

    Byte i sits at bits base + 7 .. base of the word rotated as the module says.
    """
    groups, n, _ = bytes_.shape
    index = scale_index(k, group_size, words, bytes_.device)
    blocks = index.shape[0]
    out = torch.zeros(groups, blocks, padded(n), words, dtype=torch.int32, device=bytes_.device)
    for b in range(blocks):
        part = bytes_[:, :, index[b]].to(torch.int64)
        word = torch.zeros_like(part[..., 0])
        for i, shift in enumerate((0, 16, 8, -8)):
            word |= _rotated(part[..., i] << base, shift)
        out[:, b, :n] = torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)
    return out


def unpack_scales(packed: torch.Tensor, n: int, k: int, group_size: int, base: int) -> torch.Tensor:
    """The inverse of `pack_scales`: int32 bytes [G, n, K/group_size]."""
    words = packed.shape[-1]
    index = scale_index(k, group_size, words, packed.device)
    out = torch.zeros(packed.shape[0], n, k // group_size, dtype=torch.int32, device=packed.device)
    for b in range(index.shape[0]):
        word = packed[:, b, :n].to(torch.int64) & 0xFFFFFFFF
        parts = [_rotated(word, -shift) >> base & 0xFF for shift in (0, 16, 8, -8)]
        out[:, :, index[b].flatten()] = torch.stack(parts, -1).flatten(-2).to(torch.int32)
    return out


def _rotated(word: torch.Tensor, left: int) -> torch.Tensor:
    """int64 holding 32 bits, rotated left."""
    left %= 32
    return (word << left | word >> (32 - left)) & 0xFFFFFFFF


def pack_planes(scale: torch.Tensor, k: int, group_size: int) -> torch.Tensor:
    """float32 [G, N, K/group_size] -> [G, blocks * 128/group_size, N rounded up]."""
    each = max(1, BLOCK // group_size)
    first = scale_index(k, group_size, 1, scale.device)[:, 0, :: 4 // each].flatten()
    planes = scale[:, :, first].transpose(1, 2)
    return torch.nn.functional.pad(
        planes, (0, padded(scale.shape[1]) - scale.shape[1])
    ).contiguous()


def unpack_planes(packed: torch.Tensor, n: int, k: int, group_size: int) -> torch.Tensor:
    """The inverse of `pack_planes`: [G, n, K/group_size]."""
    each = max(1, BLOCK // group_size)
    first = scale_index(k, group_size, 1, packed.device)[:, 0, :: 4 // each].flatten()
    out = packed.new_zeros(packed.shape[0], n, k // group_size)
    out[:, :, first] = packed[:, :, :n].transpose(1, 2)
    return out


# the scale byte of mxfp4 for bf16 is e8m0 - o + REBASE; products stay exact in bf16 for LOW..HIGH
REBASE, LOW, HIGH = 126, -5, 128
# with codes of 2^-14 and float32 scales, mxfp4 for fp16 stays finite up to this e8m0 byte
HIGH_FP16 = 240


def refuse(w: QuantizedTensor, compute: str) -> str | None:
    """Why these weights do not fit the layout, or None. Reads scales: synchronises on a GPU.

    Args:
        w: [G, N, K], any quantised format.
        compute: type of the tensor core operands, "bf16" or "fp16".
    """
    if w.format not in ("mxfp4", "nvfp4", "int4"):
        return f"4-bit weights, got {w.format}"
    if w.ndim != 3 or w.shape[-1] % 16:
        return f"[G, N, K] with K a multiple of 16, got {list(w.shape)}"
    if w.format == "mxfp4":
        return _refuse_mxfp4(w.scale, compute)
    if w.format == "nvfp4":
        s = w.scale.view(torch.uint8)
        if bool((s > 0x7E).any()):
            return "nvfp4 scales that are finite and not negative"
        empty = w.data.unflatten(-1, (-1, 8)).amax(-1) == 0
        if compute == "bf16" and bool(((s == 0) & ~empty).any()):
            return "zero codes under a zero nvfp4 scale"
    return None


def _refuse_mxfp4(scale: torch.Tensor, compute: str) -> str | None:
    low, high = (t.to(torch.int32) for t in scale.flatten(1).aminmax(dim=1))
    if bool((high == 255).any()):
        return "no NaN scale"
    if compute == "fp16":
        return None if bool((high <= HIGH_FP16).all()) else f"scale bytes up to {HIGH_FP16}"
    if bool((low - (high - HIGH).clamp(min=0) < LOW).any()):
        return f"scale bytes of a group within {HIGH - LOW} octaves"
    return None


def pack(
    w: QuantizedTensor, compute: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes, scales and the factor [G] of the accumulator, of weights that `refuse` accepts."""
    k, group = w.shape[-1], w.group_size or 0
    codes = pack_codes(w.data, "int4" if w.format == "int4" else compute)
    if w.format == "int4":
        return codes, pack_planes(w.scale.to(torch.float32), k, group), None
    if w.format == "mxfp4" and compute == "fp16":
        return codes, pack_scales(w.scale.to(torch.int32), k, group, 1, 7), None
    x, factor = multipliers(w)
    if w.format == "nvfp4":
        return codes, pack_scales(x, k, group, 2, 4 if compute == "bf16" else 7), factor
    return codes, pack_scales(x, k, group, 1, 7), factor


def multipliers(w: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Bytes X int32 [G, N, K/group] of mxfp4 for bf16 or of nvfp4, and the factor float32 [G]."""
    if w.format == "nvfp4":
        x = _nvfp4_bytes(w.data.device)[w.scale.view(torch.uint8).to(torch.int64)]
        factor = w.global_scale
        return x, None if factor is None else factor.expand(w.shape[0]).contiguous()
    s = w.scale.to(torch.int32)
    over = (s.flatten(1).amax(1) - HIGH).clamp(min=0)
    factor = torch.exp2(over.to(torch.float32)) if bool(over.any()) else None
    return s - over[:, None, None] + REBASE, factor


def scales_of(
    x: torch.Tensor, factor: torch.Tensor | None, format: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The inverse of `multipliers`: block scales as in the checkpoint and global scale."""
    if format == "nvfp4":
        inverse = torch.zeros(256, dtype=torch.uint8, device=x.device)
        inverse[_nvfp4_bytes(x.device)[:0x7F].to(torch.int64)] = torch.arange(
            0x7F, dtype=torch.uint8, device=x.device
        )
        return inverse[x.to(torch.int64)].view(torch.float8_e4m3fn), factor
    x = x - REBASE
    if factor is not None:
        x = x + torch.log2(factor).to(torch.int32)[:, None, None]
    return x.to(torch.uint8), None


def unpack(
    codes: torch.Tensor,
    scale: torch.Tensor,
    factor: torch.Tensor | None,
    *,
    format: str,
    group_size: int,
    n: int,
    k: int,
    compute: str,
) -> QuantizedTensor:
    """The inverse of `pack`: the weights [G, n, k] as they were given."""
    data = unpack_codes(codes, n, "int4" if format == "int4" else compute)
    if format == "int4":
        s = unpack_planes(scale, n, k, group_size).to(torch.bfloat16)
        return QuantizedTensor(data, s, format=format, group_size=group_size)
    base = 4 if format == "nvfp4" and compute == "bf16" else 7
    x = unpack_scales(scale, n, k, group_size, base)
    if format == "mxfp4" and compute == "fp16":
        return QuantizedTensor(data, x.to(torch.uint8), format=format, group_size=group_size)
    s, over = scales_of(x, factor, format)
    return QuantizedTensor(data, s, over, format=format, group_size=group_size)


def _nvfp4_bytes(device: torch.device) -> torch.Tensor:
    """int32 [256]: eeeee mmm of every finite e4m3 scale byte, subnormals normalised, 0 for 0."""
    value = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
    mantissa, exponent = torch.frexp(value[:0x7F])
    x = ((exponent - 1 + 22) << 3) | ((mantissa * 16).to(torch.int32) & 7)
    table = torch.zeros(256, dtype=torch.int32)
    table[1:0x7F] = x[1:].to(torch.int32)
    return table.to(device)
