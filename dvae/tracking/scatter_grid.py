"""Draw a sheet of scatter plots. Each run has a block of rows; blocks are in one or two columns of similar height."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from dvae.tracking import scatter

SIDE, GAP, BELOW = 1.14, 0.06, 0.23
"""In inches: the side of a panel, the space between panels, and the height of a panel's caption."""
NAMES, HEADING, TOP = 0.95, 0.55, 1.36
"""In inches: the width of the row names, the height of a block's heading, and the height of the sheet's heading."""
DPI = 110
INK, SOFT, GOOD = "#1c1b19", "#6a675f", "#1f7a5f"


@dataclass(frozen=True)
class Panel:
    """One scatter plot of the sheet."""

    block: str
    """The name of the block."""
    row: str
    """The name of the row in the block."""
    column: int
    """The index of the column, from 0."""
    points: torch.Tensor
    """The points (n, 2), in [-1, 1]."""
    caption: str
    """The text below the plot."""
    good: bool
    """Whether the caption is green."""


@dataclass(frozen=True)
class Sheet:
    """A figure on which positions are given in inches from the upper left corner."""

    figure: Figure
    width: float
    height: float

    def panel(self, points: torch.Tensor, color: str, left: float, top: float) -> None:
        """Draw points (n, 2) in a square whose upper left corner is at (left, top)."""
        size = (SIDE / self.width, SIDE / self.height)
        axes = self.figure.add_axes((left / self.width, 1 - (top + SIDE) / self.height, *size))
        scatter.panel(axes, points, color)

    def text(self, text: str, left: float, top: float, **style: str | float) -> None:
        """Write text at (left, top). `style` is passed to matplotlib."""
        self.figure.text(left / self.width, 1 - top / self.height, text, **style)  # type: ignore[arg-type]


def draw(panels: Sequence[Panel], columns: Sequence[str], true: torch.Tensor, title: str, path: Path) -> None:
    """Write the sheet as a PNG file atomically.

    Args:
        panels: The scatter plots.
        columns: The names of the columns.
        true: True points (n, 2), which are drawn beside the title.
        title: The title of the sheet. Its first line is bold.
        path: The PNG file.
    """
    rows: dict[str, list[str]] = {}
    for panel in panels:
        names = rows.setdefault(panel.block, [])
        if panel.row not in names:
            names.append(panel.row)
    sides = split({name: height(len(names)) for name, names in rows.items()})
    across = NAMES + len(columns) * (SIDE + GAP)
    tallest = max(sum(height(len(rows[name])) for name in side) for side in sides)
    width = across * len(sides) + GAP
    sheet = Sheet(Figure(figsize=(width, TOP + tallest), dpi=DPI), width, TOP + tallest)
    sheet.panel(true, scatter.TRUE, NAMES, 0.1)
    first, _, rest = title.partition("\n")
    sheet.text(first, NAMES + SIDE + 0.25, 0.45, fontsize=15, color=INK, weight="bold", va="center")
    sheet.text(rest, NAMES + SIDE + 0.25, 0.68, fontsize=10, color=SOFT, va="top", linespacing=1.5)
    for number, side in enumerate(sides):
        top = TOP
        for name in side:
            block(sheet, [p for p in panels if p.block == name], rows[name], columns, number * across, top)
            top += height(len(rows[name]))
    scatter.save(sheet.figure, path)


def block(
    sheet: Sheet, panels: Sequence[Panel], rows: Sequence[str], columns: Sequence[str], left: float, top: float
) -> None:
    """Draw the block of one run: its name, the names of the columns, and its rows."""
    sheet.text(panels[0].block, left + NAMES - 0.12, top + 0.44, fontsize=14, color=INK, weight="bold", ha="right")
    for number, name in enumerate(columns):
        middle = left + NAMES + number * (SIDE + GAP) + SIDE / 2
        sheet.text(name, middle, top + 0.44, fontsize=10, color=SOFT, ha="center")
    for panel in panels:
        x = left + NAMES + panel.column * (SIDE + GAP)
        y = top + HEADING + rows.index(panel.row) * (SIDE + BELOW)
        sheet.panel(panel.points, scatter.DRAWN, x, y)
        color = GOOD if panel.good else INK
        sheet.text(panel.caption, x + SIDE / 2, y + SIDE + 0.14, fontsize=9.5, color=color, ha="center")
        if panel.column == 0:
            sheet.text(panel.row, x - 0.12, y + SIDE / 2, fontsize=10, color=INK, ha="right", va="center")


def height(rows: int) -> float:
    """Return the height of a block with that many rows, in inches."""
    return HEADING + rows * (SIDE + BELOW)


def split(heights: Mapping[str, float]) -> list[list[str]]:
    """Divide blocks into one or two columns, in their order, so that the taller column is as short as possible.

    `heights` maps the names of the blocks to their heights. Returns the names in each column.
    """
    names = list(heights)
    cuts = [[side for side in (names[:cut], names[cut:]) if side] for cut in range(1, len(names) + 1)]
    return min(cuts, key=lambda sides: max(sum(heights[name] for name in side) for side in sides))
