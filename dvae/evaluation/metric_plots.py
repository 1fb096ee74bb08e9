"""Plot studies: one panel for each metric, one curve for each sampler or set, and the floor as dotted lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dvae.evaluation.tables import names
from dvae.utils import atomic_files

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK_COLOR, SOFT_COLOR = "#1c1b19", "#6a675f"
COLORS = ("#2f6db3", "#c8553d", "#3f8f5b", "#8a5fb0", "#b8862b", "#4b9aa3")
PANEL_WIDTH, PANEL_HEIGHT, DPI = 4.2, 3.8, 110
"""Inches of a panel's width and height; dots per inch."""


def plot_study(
    results: Sequence[Mapping[str, Any]], x_values: Sequence[float], curves: Sequence[str], x_label: str, title: str,
    path: Path,
) -> None:  # fmt: skip
    """Plot the metrics of `results` over `x_values`, and write a PNG file to `path`.

    Results with the same name in `curves` form one curve. Error bars are standard errors over seeds.
    """
    metrics = names(results)
    figure = Figure(figsize=(PANEL_WIDTH * len(metrics), PANEL_HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    for number, metric in enumerate(metrics):
        plot = figure.add_subplot(1, len(metrics), number + 1)
        several = len({name for result in results for name in result["sets"]}) > 1
        lines: dict[str, list[tuple[float, float, float]]] = {}
        for result, x, curve in zip(results, x_values, curves, strict=True):
            for name, figures in result["sets"].items():
                value = figures[metric]
                label = f"{curve}: {name}" if several and curve else curve or name
                lines.setdefault(label, []).append((x, value["mean"], value["se"] or 0.0))
        for color, (label, points) in enumerate(lines.items()):
            x, y, error = np.array(sorted(points)).T
            plot.errorbar(x, y, error, color=COLORS[color % len(COLORS)], marker="o", ms=4, capsize=3, label=label)
        for (name, figures), style in zip(results[0]["floor"].items(), (":", "--"), strict=False):
            if metric in figures:
                plot.axhline(figures[metric]["mean"], color=SOFT_COLOR, ls=style, lw=1, label=f"real images: {name}")
        style_axes(plot, x_label, metric)
        plot.legend(fontsize=7, frameon=False)
    figure.suptitle(title, fontsize=10, color=INK_COLOR)
    atomic_files.write_file(path, lambda aside: figure.savefig(aside, dpi=DPI, format="png"))


def style_axes(plot: Axes, x_label: str, y_label: str) -> None:
    """Label the axes of a plot, and apply the common style."""
    plot.set_xlabel(x_label, fontsize=9)
    plot.set_ylabel(y_label, fontsize=9)
    plot.tick_params(labelsize=8)
    plot.grid(alpha=0.25)
    plot.spines[["top", "right"]].set_visible(False)
