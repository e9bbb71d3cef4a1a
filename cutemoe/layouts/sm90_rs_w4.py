"""4-bit weights in the order in which wgmma takes its A operand from registers on SM90.

A unit holds 64 rows and 64 columns and is contiguous, so that one bulk copy brings any number of
neighbouring units of a row block. Rows and columns are padded to whole units with zero codes.

    data    uint8 [G, row blocks, column blocks, unit bytes]: codes, then scales

Codes, 2048 bytes: [warp 4][lane 32][word 4]. Lane 4 g + t of warp w owns rows 16 w + g + 8 h; word
2 j + h holds its eight codes of columns 32 j .. 32 j + 31: its share of the fragments of 32
columns and, for mxfp4, of one group. One 16-byte load a lane brings a unit. Where the codes sit in
a word depends on the type of the tensor core operands, one layout each:

| layout | columns of a word | bits |
|---|---|---|
| sm90_rs_w4 (bf16), sm90_rs_w4_fp16 | k = 8 i + 2 t + half, i = 0..3 | as in layout sm80_w4 |
| sm90_rs_w4_fp8 | k = 16 i + 4 t + byte, i = 0, 1 | `FP8_BITS` |

Scales follow as words [warp 4][g 8] for rows g and g + 8, in the low and in the high half:

| weights | words | a half |
|---|---|---|
| mxfp4, nvfp4 in bf16 and fp16 | mxfp4 one; nvfp4 one for each 32 columns | a byte at bits 14..7 (nvfp4 in bf16: 11..4); that of the second group (of 32 columns for mxfp4, 16 for nvfp4) likewise in the word rotated right by 8 |
| int4 | one for each group of 32 or 64 | the bf16 scale |
| int4, groups of 128 | half a word: unit 2 u has warps 0 and 1, unit 2 u + 1 the others | the bf16 scale |
| mxfp4 in fp8 | one | exponent byte b, then shifts d1 and d0 of four bits: group j is code * 2^(d_j - 6) * 2^(b - 127) |

The bytes are those of layout sm80_w4 for bf16 and for nvfp4; of mxfp4 in fp16 8 X, so that X is the
exponent of fp16 of 2^14 times the scale / o, o per group of weights in the factor. In fp8 four groups
of mxfp4 share b, and their codes are shifted exactly: 11 octaves within 128 columns, or refused.

Order of rows. "plain", or pairs for an activation that joins rows: rows 16 q + i and 16 q + 8 + i
(i < 8) of the packed tensor are gate and up row 8 q + i of weights that hold them as "gate_up",
"up_gate" or "interleaved". Both sums of an output then sit in one lane.

Rejected: a layout for each tile size (one copy serves prefill and decode), separate scales (a second
copy a stage), 128 columns a unit (2880 columns would be padded to 2944).
"""  # noqa: E501

from __future__ import annotations

import torch

from cutemoe.formats import QuantizedTensor, e2m1
from cutemoe.layouts import sm80_w4

ROWS = COLUMNS = 64
CODE_BYTES = ROWS * COLUMNS // 2
# layout -> type of the tensor core operands
COMPUTE = {"sm90_rs_w4": "bf16", "sm90_rs_w4_fp16": "fp16", "sm90_rs_w4_fp8": "fp8"}
WEIGHTS = {
    "bf16": ("mxfp4", "nvfp4", "int4"),
    "fp16": ("mxfp4", "nvfp4", "int4"),
    "fp8": ("mxfp4", "int4"),
}
ORDERS = ("plain", "gate_up", "up_gate", "interleaved")
# of gates, and of ups, that alternate
PAIRED = 8
# columns that share the exponent of mxfp4 in fp8
SHARED = 128
# the greatest shift of a group: 6 * 2^(12 - 6) is below 448
_MOST_SHIFT = 12
# exponents of fp16 multipliers under which products of e2m1 are exact, and finite
_LOW_FP16, _HIGH_FP16 = 6, 30
# X of a scale byte of mxfp4
_REBASE_FP16 = -98

# bits 0..3 of codes (i, byte) = (0, 0) .. (1, 3); int4 as sign and n or -1 - n
FP8_BITS = {
    "int4": (
        *((8 * b, 8 * b + 1, 8 * b + 2, 8 * b + 7) for b in range(4)),
        *((8 * b + 4, 8 * b + 5, 8 * b + 6, 8 * ((b + 1) % 4) + 3) for b in range(4)),
    ),
    "mxfp4": (
        *((4 * b, 4 * b + 1, 4 * b + 2, 8 * b + 7) for b in range(4)),
        *((4 * b + 16, 4 * b + 17, 4 * b + 18, 8 * b + 3) for b in range(4)),
    ),
}


def scale_bytes(format: str, group_size: int) -> int:
    """Bytes of the scales of a unit."""
    return {"mxfp4": 128, "nvfp4": 256}.get(format) or 8192 // group_size


def unit_bytes(format: str, group_size: int) -> int:
    """Bytes of 64 rows and 64 columns."""
    return CODE_BYTES + scale_bytes(format, group_size)


def blocks(n: int) -> int:
    """Units that n rows or columns need."""
    return -(-n // ROWS)


def refuse(w: QuantizedTensor, order: str = "plain", compute: str = "bf16") -> str | None:
    """Why these weights do not fit the layout, or None. Reads scales: synchronises on a GPU."""
    if w.format not in WEIGHTS[compute]:
        return f"{' or '.join(WEIGHTS[compute])} weights, got {w.format}"
    if order != "plain" and w.ndim == 3 and w.shape[1] % (2 * PAIRED):
        return f"gate and up rows in multiples of {PAIRED}, got {w.shape[1] // 2}"
    if w.format != "mxfp4" or compute == "bf16":
        return sm80_w4.refuse(w, "fp16" if compute == "fp16" else "bf16")
    if w.ndim != 3:
        return f"[G, N, K], got {list(w.shape)}"
    if bool((w.scale == 255).any()):
        return "no NaN scale"
    if compute == "fp16":
        low, high = (t.to(torch.int32) for t in w.scale.flatten(1).aminmax(dim=1))
        span = _HIGH_FP16 - _LOW_FP16
        return (
            f"scale bytes of a group within {span} octaves"
            if bool((high - low > span).any())
            else None
        )
    _, shift, live = _shifts(w)
    if bool(((shift < 1) & live).any()):
        return f"scale bytes of {SHARED} columns within {_MOST_SHIFT - 1} octaves"
    return None


def row_order(n: int, order: str, device: torch.device) -> torch.Tensor | None:
    """Which row of the weights every packed row holds, int64 [n]; None where they are the same."""
    if order == "plain":
        return None
    half = torch.arange(n // 2, device=device)
    gate, up = {
        "gate_up": (half, half + n // 2),
        "up_gate": (half + n // 2, half),
        "interleaved": (2 * half, 2 * half + 1),
    }[order]
    return torch.stack([gate.view(-1, PAIRED), up.view(-1, PAIRED)], 1).flatten()


def pack(
    w: QuantizedTensor, order: str = "plain", compute: str = "bf16"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Data and the factor [G] of the accumulator, of weights [G, N, K] that `refuse` accepts."""
    groups, n, k = w.shape
    group = w.group_size or 0
    multiplier, factor = _multipliers(w, compute)
    shape = (groups, blocks(n), blocks(k), unit_bytes(w.format, group))
    out = torch.empty(shape, dtype=torch.uint8, device=w.data.device)
    at = row_order(n, order, w.data.device)
    chunk = max(1, sm80_w4.CHUNK // (n * k))
    for g in range(0, groups, chunk):
        data, m = w.data[g : g + chunk], multiplier[g : g + chunk]
        if at is not None:
            data, m = data[:, at], m[:, at]
        out[g : g + chunk, ..., :CODE_BYTES] = _pack_codes(data, w.format, compute)
        part = out[g : g + chunk, ..., CODE_BYTES:]
        if _in_halves(w.format, compute):
            part[:] = _pack_halves(m, part.shape[2:])
        else:
            part[:] = _pack_bytes(m, w.format, compute)
    return out, factor


def unpack(
    data: torch.Tensor,
    factor: torch.Tensor | None,
    *,
    format: str,
    group_size: int,
    n: int,
    k: int,
    order: str = "plain",
    compute: str = "bf16",
) -> QuantizedTensor:
    """The inverse of `pack`: the weights [G, n, k] as they were given.

    Only the scale of a group of zeros that lies too far from its neighbours in fp8 comes back
    nearer.
    """
    codes = _unpack_codes(data[..., :CODE_BYTES], format, compute)[:, :n, : k // 2]
    packed = data[..., CODE_BYTES:]
    if _in_halves(format, compute):
        m = _unpack_halves(packed)
    else:
        m = _unpack_bytes(packed, format, compute)
    m = m[:, :n]
    at = row_order(n, order, data.device)
    if at is not None:
        back = torch.argsort(at)
        codes, m = codes[:, back], m[:, back]
    scale, over = _scales_of(m, factor, format, compute, k // group_size)
    return QuantizedTensor(codes.contiguous(), scale, over, format=format, group_size=group_size)


def _in_halves(format: str, compute: str) -> bool:
    """A scale is a half-word, not a byte."""
    return format == "int4" or compute == "fp8"


def _multipliers(w: QuantizedTensor, compute: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What is stored of the scales, int32 [G, N, columns of scales], and the factor [G]."""
    if w.format == "int4":
        return w.scale.view(torch.int16).to(torch.int32) & 0xFFFF, None
    if compute == "fp8":
        base, shift, _ = _shifts(w)
        shift = shift.clamp(1, _MOST_SHIFT).unflatten(-1, (-1, 2))
        exponent = base.repeat_interleave(2, -1) - 6
        half = exponent << 8 | shift[..., 1] << 4 | shift[..., 0]
        return half[..., : blocks(w.shape[-1])], None
    if w.format == "nvfp4" or compute == "bf16":
        return sm80_w4.multipliers(w)
    x = w.scale.to(torch.int32) + _REBASE_FP16
    low, high = x.flatten(1).aminmax(dim=1)
    over = torch.where((low < _LOW_FP16) | (high > _HIGH_FP16), high - _HIGH_FP16, 0)
    factor = torch.exp2(over.to(torch.float32)) if bool(over.any()) else None
    return x - over[:, None, None] << 3, factor


def _scales_of(
    m: torch.Tensor, factor: torch.Tensor | None, format: str, compute: str, count: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The inverse of `_multipliers`: `count` block scales a row, and the global scale."""
    if format == "int4":
        m = m[..., :count]
        return torch.where(m >= 1 << 15, m - (1 << 16), m).to(torch.int16).view(
            torch.bfloat16
        ), None
    if compute == "fp8":
        shift = torch.stack([m & 15, m >> 4 & 15], -1)
        s = (shift + (m >> 8)[..., None] + 6 - _MOST_SHIFT).flatten(-2)
        return s[..., :count].to(torch.uint8), None
    m = m[..., :count]
    if format == "nvfp4" or compute == "bf16":
        return sm80_w4.scales_of(m, factor, format)
    x = m >> 3
    if factor is not None:
        x = x + torch.log2(factor).to(torch.int32)[:, None, None]
    return (x - _REBASE_FP16).to(torch.uint8), None


def _shifts(w: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mxfp4 in fp8: exponent [G, N, blocks of 128], shift and whether a code is not 0, [.., 4]."""
    each = SHARED // 32
    s = w.scale.to(torch.int32)
    live = (w.data.unflatten(-1, (-1, 16)) & 0x77).amax(-1) > 0
    extra = -s.shape[-1] % each
    s = torch.nn.functional.pad(s, (0, extra))
    live = torch.nn.functional.pad(live, (0, extra))
    top = torch.where(live, s, 0).unflatten(-1, (-1, each)).amax(-1)
    # b = base - 6 is an exponent of float32, at least 1
    base = top.clamp(min=7)
    return base, s - base.repeat_interleave(each, -1) + _MOST_SHIFT, live


def _pack_codes(data: torch.Tensor, format: str, compute: str) -> torch.Tensor:
    """uint8 [G, N, K/2] -> uint8 [G, row blocks, column blocks, CODE_BYTES]."""
    code = _padded(e2m1.unpack(data).to(torch.int32), ROWS, COLUMNS, 0)
    groups, n, k = code.shape
    if compute == "fp8":
        half = _place_fp8(code.view(groups, n, k // 32, 2, 4, 4), format)
    else:
        bits = "int4" if format == "int4" else compute
        half = sm80_w4.place(code.view(groups, n, k // 32, 4, 8), bits)
    # row block, warp, h, g, column block, j, t, half
    half = half.view(groups, n // ROWS, 4, 2, 8, k // COLUMNS, 2, 4, 2)
    half = half.permute(0, 1, 5, 2, 4, 7, 6, 3, 8).contiguous()
    return half.view(torch.uint8).view(groups, n // ROWS, k // COLUMNS, CODE_BYTES)


def _unpack_codes(packed: torch.Tensor, format: str, compute: str) -> torch.Tensor:
    """The inverse of `_pack_codes`, padding included."""
    groups, rows, columns, _ = packed.shape
    half = packed.contiguous().view(torch.int16).view(groups, rows, columns, 4, 8, 4, 2, 2, 2)
    half = half.permute(0, 1, 3, 7, 4, 2, 6, 5, 8).reshape(groups, rows * ROWS, columns * 2, 8)
    if compute == "fp8":
        code = _lift_fp8(half, format)
    else:
        code = sm80_w4.lift(half.to(torch.int32), "int4" if format == "int4" else compute)
    return e2m1.pack(code.reshape(groups, rows * ROWS, columns * COLUMNS).to(torch.uint8))


def _place_fp8(code: torch.Tensor, format: str) -> torch.Tensor:
    """Codes int32 [..., i 2, t 4, byte 4] -> int16 [..., 8]: words of t, low half first."""
    code = _recoded(code, format)
    word = torch.zeros_like(code[..., 0, :, 0])
    for number, places in enumerate(FP8_BITS[format]):
        for b, position in enumerate(places):
            word |= (code[..., number // 4, :, number % 4] >> b & 1) << position
    return word.contiguous().view(torch.int16)


def _lift_fp8(half: torch.Tensor, format: str) -> torch.Tensor:
    """The inverse of `_place_fp8`."""
    word = half.contiguous().view(torch.int32)
    codes = []
    for places in FP8_BITS[format]:
        code = torch.zeros_like(word)
        for b, position in enumerate(places):
            code |= (word >> position & 1) << b
        codes.append(code)
    code = torch.stack(codes, -2).unflatten(-2, (2, 4)).transpose(-1, -2)
    return _recoded(code.contiguous(), format)


def _recoded(code: torch.Tensor, format: str) -> torch.Tensor:
    """Negative codes of int4 have their low bits flipped; its own inverse."""
    return code ^ (code >> 3) * 7 if format == "int4" else code


def _base(format: str, compute: str) -> int:
    """Lowest bit of a multiplier byte in a half-word."""
    return 4 if format == "nvfp4" and compute == "bf16" else 7


def _pack_bytes(multiplier: torch.Tensor, format: str, compute: str) -> torch.Tensor:
    """int32 bytes [G, N, K/group] -> uint8 [G, row blocks, column blocks, bytes]."""
    per = scale_bytes(format, 0) // 64
    # under zero codes every finite multiplier is right
    m = _padded(multiplier, ROWS, per, 127).to(torch.int64)
    groups, n, count = m.shape
    columns = count // per
    # row block, warp, h, g, column block, word, first or second group
    m = m.view(groups, n // ROWS, 4, 2, 8, columns, per // 2, 2) << _base(format, compute)
    both = m[:, :, :, 0] | m[:, :, :, 1] << 16
    second = both[..., 1]
    word = _signed(both[..., 0] | second >> 8 | (second & 0xFF) << 24)
    word = word.permute(0, 1, 4, 2, 3, 5).contiguous()
    return word.view(torch.uint8).view(groups, n // ROWS, columns, 64 * per)


def _unpack_bytes(packed: torch.Tensor, format: str, compute: str) -> torch.Tensor:
    """The inverse of `_pack_bytes`, padding included: int32 bytes."""
    per = scale_bytes(format, 0) // 64
    groups, rows, columns, _ = packed.shape
    word = packed.contiguous().view(torch.int32).view(groups, rows, columns, 4, 8, per // 2)
    word = word.permute(0, 1, 3, 4, 2, 5).to(torch.int64) & 0xFFFFFFFF
    turned = (word << 8 | word >> 24) & 0xFFFFFFFF
    pair = torch.stack([word, turned], -1)
    halves = torch.stack([pair, pair >> 16], 3) >> _base(format, compute) & 0xFF
    return halves.reshape(groups, rows * ROWS, columns * per).to(torch.int32)


def _pack_halves(multiplier: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """int32 half-words [G, N, C] -> uint8 [G, row blocks, *shape]; shape: units, bytes."""
    per = max(1, shape[1] // 128)
    m = _padded(multiplier, ROWS, per, 0).to(torch.int64)
    groups, n, count = m.shape
    m = m.view(groups, n // ROWS, 4, 2, 8, count // per, per)
    word = _signed(m[:, :, :, 0] | m[:, :, :, 1] << 16)
    # row block, unit or pair of units, warp, g, word
    word = word.permute(0, 1, 4, 2, 3, 5).contiguous()
    return word.view(torch.uint8).view(groups, n // ROWS, *shape)


def _unpack_halves(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `_pack_halves`, padding included: int32 half-words."""
    groups, rows = packed.shape[:2]
    per = max(1, packed.shape[-1] // 128)
    word = packed.contiguous().view(torch.int32).view(groups, rows, -1, 4, 8, per)
    word = word.permute(0, 1, 3, 4, 2, 5).to(torch.int64) & 0xFFFFFFFF
    halves = torch.stack([word & 0xFFFF, word >> 16], 3)
    return halves.reshape(groups, rows * ROWS, -1).to(torch.int32)


def _signed(word: torch.Tensor) -> torch.Tensor:
    """int64 holding 32 bits -> int32."""
    return torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)


def _padded(x: torch.Tensor, rows: int, columns: int, value: int) -> torch.Tensor:
    right, below = -x.shape[-1] % columns, -x.shape[-2] % rows
    return torch.nn.functional.pad(x, (0, right, 0, below), value=value).contiguous()
