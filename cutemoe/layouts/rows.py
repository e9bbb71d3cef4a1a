"""Layout "rows": row-major, the bytes of the checkpoint, for codes and for scales."""

from cutemoe.layouts.layout import Layout

ROWS = Layout(
    name="rows",
    rows=1,
    columns=1,
    move=lambda x: x,
    restore=lambda packed, shape: packed,
    moved=lambda shape: shape,
)
