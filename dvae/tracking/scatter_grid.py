"""A sheet of scatter plots: a block of rows per run, in one or two columns of about the same height."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from dvae.tracking import scatter

SIDE, GAP, BELOW = 1.14, 0.06, 0.23
"""Inches: side of a panel, space between panels, height of a panel's caption."""
NAMES, HEADING, TOP = 0.95, 0.55, 1.36
"""Inches: width of the rows' names, height of a block's heading, height of the sheet's."""
DPI = 110
INK, SOFT, GOOD = "#1c1b19", "#6a675f", "#1f7a5f"


@dataclass(frozen=True)
class Panel:
    """The points of one place on the sheet."""

    block: str
    row: str
    column: int
    points: torch.Tensor
    """(n, 2), in [-1, 1]."""
    caption: str
    good: bool
    """Whether the caption is shown as a success."""


@dataclass(frozen=True)
class Sheet:
    """A figure whose places are given in inches from its upper left corner."""

    figure: Figure
    width: float
    height: float

    def panel(self, points: torch.Tensor, color: str, left: float, top: float) -> None:
        size = (SIDE / self.width, SIDE / self.height)
        axes = self.figure.add_axes((left / self.width, 1 - (top + SIDE) / self.height, *size))
        scatter.panel(axes, points, color)

    def text(self, text: str, left: float, top: float, **style: str | float) -> None:
        self.figure.text(left / self.width, 1 - top / self.height, text, **style)  # type: ignore[arg-type]


def draw(panels: Sequence[Panel], columns: Sequence[str], true: torch.Tensor, title: str, path: Path) -> None:
    """Write the sheet as PNG, in one rename; the title's first line is bold, `true` points (n, 2) stand beside it."""
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
    """One run: its name, the names of the columns, and its rows."""
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
    """Inches that a block of so many rows takes."""
    return HEADING + rows * (SIDE + BELOW)


def split(heights: Mapping[str, float]) -> list[list[str]]:
    """Names in one side, or in two, in their order, such that the taller side is as low as can be."""
    names = list(heights)
    cuts = [[side for side in (names[:cut], names[cut:]) if side] for cut in range(1, len(names) + 1)]
    return min(cuts, key=lambda sides: max(sum(heights[name] for name in side) for side in sides))
