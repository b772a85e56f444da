"""Tables of text: every column as wide as its widest cell."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], align: str = "<>") -> list[list[str]]:
    """Fill cells up with spaces to the width of their column.

    Args:
        rows: Cells, of one number in every row.
        align: "<" (left) or ">" (right) for each column; the last one holds for all further columns.

    Returns:
        The same cells, of one width in each column.
    """
    signs = align + align[-1] * len(rows[0])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [[f"{cell:{sign}{width}}" for cell, sign, width in zip(row, signs, widths, strict=False)] for row in rows]


def table(rows: Sequence[Sequence[str]], align: str = "<>", indent: int = 0) -> str:
    """Rows as lines, with two spaces between columns and none at the end of a line.

    Args:
        rows: Cells, of one number in every row; the first row is the heading.
        align: As of `aligned`.
        indent: Spaces before each line.
    """
    return "\n".join((" " * indent + "  ".join(row)).rstrip() for row in aligned(rows, align))
