"""Text tables with aligned columns, for Markdown files and for terminals."""

from __future__ import annotations

from collections.abc import Sequence

from dvae.errors import printable_line


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are aligned in the plain text too.

    Control characters in cells are replaced.
    """
    header, *rows = [[printable_line(cell) for cell in row] for row in [header, *rows]]
    widths = column_widths([header, *rows])
    lines = [f"| {' | '.join(_pad(row, widths))} |" for row in [header, *rows]]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def aligned_lines(rows: Sequence[Sequence[str]], right: bool = False) -> list[str]:
    """Return the lines of a table for a terminal. Cells are left-aligned, or right-aligned if `right` is true."""
    widths = column_widths(rows)
    return ["  ".join(_pad(row, widths, right)).rstrip() for row in rows]


def column_widths(rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the width of each column: the number of characters of its longest cell."""
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _pad(row: Sequence[str], widths: Sequence[int], right: bool = False) -> list[str]:
    return [cell.rjust(width) if right else cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
