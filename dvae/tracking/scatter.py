"""Draw scatter plots of 2D points as PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dvae.utils import atomic_files

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRUE, DRAWN = "#8a8780", "#2f5fd0"
"""Colors of true and of drawn points."""


def compare(true: Mapping[str, torch.Tensor], drawn: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write a PNG file atomically: true points in the top row, drawn points in the bottom row, one column per name.

    Each tensor has the shape (n, 2), with values in [-1, 1].
    """
    # Imported here because matplotlib loads slowly and every command imports this module through the stages.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.9 * len(true), 4.1), dpi=100, layout="constrained")
    axes = figure.subplots(2, len(true), squeeze=False)
    for column, name in enumerate(true):
        panel(axes[0, column], true[name], TRUE)
        panel(axes[1, column], drawn[name], DRAWN)
        axes[0, column].set_title(name, fontsize=10)
    axes[0, 0].set_ylabel("true")
    axes[1, 0].set_ylabel("drawn")
    save(figure, path)


def panel(axes: Axes, points: torch.Tensor, color: str) -> None:
    """Draw points (n, 2) in a square from -1.05 to 1.05 without ticks. Points outside are not shown."""
    axes.scatter(points[:, 0], points[:, 1], s=1.0, c=color, alpha=0.5, linewidths=0)
    axes.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xticks=[], yticks=[], aspect="equal")
    for spine in axes.spines.values():
        spine.set_color("#d8d4c8")


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG file atomically."""
    atomic_files.write_file(path, lambda aside: figure.savefig(aside, format="png"))
