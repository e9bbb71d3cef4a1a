"""4-bit weights in the order in which wgmma takes its A operand from registers on SM90.

A unit holds 64 rows and 64 columns and is contiguous, so that one bulk copy brings any number of
neighbouring units of a row block. Rows and columns are padded to whole units with zero codes.

    data    uint8 [G, row blocks, column blocks, unit bytes]: codes, then scales

Codes, 2048 bytes: [warp 4][lane 32][word 4]. Lane 4 g + t of warp w owns rows 16 w + g + 8 h; word
2 j + h holds its eight codes of columns 32 j .. 32 j + 31, k = 8 i + 2 t + half for i = 0..3. That
is its share of four k16 fragments and, for mxfp4, of one group. One 16-byte load a lane brings a
unit. Within a word the bits are placed as in layout sm80_w4 ("bf16").

Scales, words [warp 4][g 8] for rows g and g + 8: mxfp4 one, nvfp4 one for each 32 columns. The
multiplier bytes of rows g and g + 8 sit in the two halves at bits 14..7 (nvfp4: 11..4); those of
the second group (of 32 columns for mxfp4, 16 for nvfp4) likewise in the word rotated right by 8.
The values of the bytes are those of layout sm80_w4 for bf16.

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
SCALE_BYTES = {"mxfp4": 128, "nvfp4": 256}
ORDERS = ("plain", "gate_up", "up_gate", "interleaved")
# rows of gates, and of ups, that alternate
PAIRED = 8
# of the multiplier byte in a half-word
_BASE = {"mxfp4": 7, "nvfp4": 4}


def unit_bytes(format: str) -> int:
    """Bytes of 64 rows and 64 columns."""
    return CODE_BYTES + SCALE_BYTES[format]


def blocks(n: int) -> int:
    """Units that n rows or columns need."""
    return -(-n // ROWS)


def refuse(w: QuantizedTensor, order: str = "plain") -> str | None:
    """Why these weights do not fit the layout, or None. Reads scales: synchronises on a GPU."""
    if w.format not in SCALE_BYTES:
        return f"mxfp4 or nvfp4 weights, got {w.format}"
    if order != "plain" and w.ndim == 3 and w.shape[1] % (2 * PAIRED):
        return f"gate and up rows in multiples of {PAIRED}, got {w.shape[1] // 2}"
    return sm80_w4.refuse(w, "bf16")


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


def pack(w: QuantizedTensor, order: str = "plain") -> tuple[torch.Tensor, torch.Tensor | None]:
    """Data and the factor [G] of the accumulator, of weights [G, N, K] that `refuse` accepts."""
    groups, n, k = w.shape
    multiplier, factor = sm80_w4.multipliers(w)
    unit = unit_bytes(w.format)
    shape = (groups, blocks(n), blocks(k), unit)
    out = torch.empty(shape, dtype=torch.uint8, device=w.data.device)
    at = row_order(n, order, w.data.device)
    chunk = max(1, sm80_w4.CHUNK // (n * k))
    for g in range(0, groups, chunk):
        data, m = w.data[g : g + chunk], multiplier[g : g + chunk]
        if at is not None:
            data, m = data[:, at], m[:, at]
        out[g : g + chunk, ..., :CODE_BYTES] = _pack_codes(data)
        out[g : g + chunk, ..., CODE_BYTES:] = _pack_scales(m, w.format)
    return out, factor


def unpack(
    data: torch.Tensor,
    factor: torch.Tensor | None,
    *,
    format: str,
    n: int,
    k: int,
    order: str = "plain",
) -> QuantizedTensor:
    """The inverse of `pack`: the weights [G, n, k] as they were given."""
    codes = _unpack_codes(data[..., :CODE_BYTES])[:, :n, : k // 2]
    group = 32 if format == "mxfp4" else 16
    m = _unpack_scales(data[..., CODE_BYTES:], format)[:, :n, : k // group]
    at = row_order(n, order, data.device)
    if at is not None:
        back = torch.argsort(at)
        codes, m = codes[:, back], m[:, back]
    scale, over = sm80_w4.scales_of(m, factor, format)
    return QuantizedTensor(codes.contiguous(), scale, over, format=format, group_size=group)


def _pack_codes(data: torch.Tensor) -> torch.Tensor:
    """uint8 [G, N, K/2] -> uint8 [G, row blocks, column blocks, CODE_BYTES]."""
    code = _padded(e2m1.unpack(data).to(torch.int32), ROWS, COLUMNS, 0)
    groups, n, k = code.shape
    half = sm80_w4.place(code.view(groups, n, k // 32, 4, 8), "bf16")
    # row block, warp, h, g, column block, j, t, half
    half = half.view(groups, n // ROWS, 4, 2, 8, k // COLUMNS, 2, 4, 2)
    half = half.permute(0, 1, 5, 2, 4, 7, 6, 3, 8).contiguous()
    return half.view(torch.uint8).view(groups, n // ROWS, k // COLUMNS, CODE_BYTES)


def _unpack_codes(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `_pack_codes`, padding included."""
    groups, rows, columns, _ = packed.shape
    half = packed.contiguous().view(torch.int16).view(groups, rows, columns, 4, 8, 4, 2, 2, 2)
    half = half.permute(0, 1, 3, 7, 4, 2, 6, 5, 8).reshape(groups, rows * ROWS, columns * 2, 8)
    code = sm80_w4.lift(half.to(torch.int32), "bf16")
    return e2m1.pack(code.reshape(groups, rows * ROWS, columns * COLUMNS).to(torch.uint8))


def _pack_scales(multiplier: torch.Tensor, format: str) -> torch.Tensor:
    """int32 bytes [G, N, K/group] -> uint8 [G, row blocks, column blocks, SCALE_BYTES]."""
    per = SCALE_BYTES[format] // 64
    # under zero codes every finite multiplier is right
    m = _padded(multiplier, ROWS, per, 127).to(torch.int64)
    groups, n, count = m.shape
    columns = count // per
    # row block, warp, h, g, column block, word, first or second group
    m = m.view(groups, n // ROWS, 4, 2, 8, columns, per // 2, 2) << _BASE[format]
    both = m[:, :, :, 0] | m[:, :, :, 1] << 16
    second = both[..., 1]
    word = both[..., 0] | second >> 8 | (second & 0xFF) << 24
    word = torch.where(word >= 1 << 31, word - (1 << 32), word).to(torch.int32)
    word = word.permute(0, 1, 4, 2, 3, 5).contiguous()
    return word.view(torch.uint8).view(groups, n // ROWS, columns, SCALE_BYTES[format])


def _unpack_scales(packed: torch.Tensor, format: str) -> torch.Tensor:
    """The inverse of `_pack_scales`, padding included: int32 bytes."""
    per = SCALE_BYTES[format] // 64
    groups, rows, columns, _ = packed.shape
    word = packed.contiguous().view(torch.int32).view(groups, rows, columns, 4, 8, per // 2)
    word = word.permute(0, 1, 3, 4, 2, 5).to(torch.int64) & 0xFFFFFFFF
    turned = (word << 8 | word >> 24) & 0xFFFFFFFF
    pair = torch.stack([word, turned], -1)
    halves = torch.stack([pair, pair >> 16], 3) >> _BASE[format] & 0xFF
    return halves.reshape(groups, rows * ROWS, columns * per).to(torch.int32)


def _padded(x: torch.Tensor, rows: int, columns: int, value: int) -> torch.Tensor:
    right, below = -x.shape[-1] % columns, -x.shape[-2] % rows
    return torch.nn.functional.pad(x, (0, right, 0, below), value=value).contiguous()
