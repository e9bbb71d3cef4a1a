"""Aligned text tables."""

from __future__ import annotations

from collections.abc import Sequence


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], right: str = "") -> str:
    """Lines of columns as wide as their widest cell.

    Args:
        titles: one a column.
        rows: cells of every line.
        right: titles, separated by spaces, of the columns that are aligned right.
    """
    aligned = right.split()
    lines = [titles, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if title in aligned else cell.ljust(width)
            for cell, width, title in zip(cells, widths, titles, strict=True)
        ]
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(titles), rule, *(line(row) for row in rows)])
