"""Draw parallel coordinates, with an axis for each swept parameter and the metric, and a curve for each trial."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dvae.experiments.sweeps.sweep_loop import format_value
from dvae.experiments.sweeps.sweep_spec import SweepSpec
from dvae.experiments.sweeps.trial_table import ranked
from dvae.experiments.sweeps.trials import Trial
from dvae.utils import atomic_files

INK, SOFT = "#1c1b19", "#6a675f"
PER_AXIS, SIDE, HEIGHT, DPI = 1.8, 1.0, 4.4, 110
"""Inches between two axes, inches beside the outer axes, height in inches, and dots per inch."""
LETTERS = 22
"""Maximum number of characters in a line of an axis' name."""
FLAT = 0.12
"""Weight of a straight line in a curve between two axes: 0 gives a smooth step, 1 a straight line."""


@dataclass(frozen=True)
class ParallelAxis:
    """An axis that maps values to [0, 1], with labels for some of them."""

    name: str
    place: Callable[[Any], float]
    """Maps a value to its position in [0, 1]."""
    ticks: Sequence[tuple[float, str]]
    """Position and text of each label."""


def draw(trials: Sequence[Trial], spec: SweepSpec, path: Path) -> None:
    """Write the picture as a PNG file, atomically.

    The curve of a trial without a metric is gray and dotted, and does not reach the axis of the metric.
    """
    axes = [
        axis_of(name, [trial.parameters[name] for trial in trials], "log" in str(given.get("distribution", "")))
        for name, given in spec.sweep["parameters"].items()
        if "value" not in given  # a constant has no axis
    ]
    metrics = [trial.metric for trial in trials if trial.metric is not None]
    last = axis_of(spec.metric, metrics, needs_log_scale(metrics)) if metrics else None
    width = 2 * SIDE + PER_AXIS * len(axes)
    figure = Figure(figsize=(width, HEIGHT))
    FigureCanvasAgg(figure)
    plot = figure.add_axes((SIDE / width, 0.06, 1 - 2 * SIDE / width, 0.72))
    for trial in reversed(ranked(trials, spec)):  # draw the best trial last, on top
        heights = [axis.place(trial.parameters[axis.name]) for axis in axes]
        if last is None or trial.metric is None:
            draw_curve(plot, heights, SOFT, 1.0, ":")
        else:
            height = last.place(trial.metric)
            good = 1 - height if spec.minimizes else height
            draw_curve(plot, [*heights, height], colormaps["viridis"](0.92 * good), 1.0 + 1.6 * (good == 1.0), "-")
    for number, axis in enumerate([*axes, last] if last else axes):
        draw_axis(plot, number, axis)
    plot.set_xlim(0, len(axes))
    plot.set_ylim(0, 1)
    plot.axis("off")
    goal = "least" if spec.minimizes else "greatest"
    figure.text(0.02, 0.95, f"{spec.name}: {len(trials)} trials, bold: {goal} {spec.metric}", color=INK, fontsize=11)
    atomic_files.write_file(path, lambda aside: figure.savefig(aside, dpi=DPI, format="png"))


def axis_of(name: str, values: Sequence[Any], logarithmic: bool) -> ParallelAxis:
    """Return an axis over `values`.

    Finite numbers are placed on a linear or logarithmic scale. Other values are placed in equal steps.
    """
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    if not numbers or any(not math.isfinite(value) for value in values):
        kinds = sorted({format_value(value) for value in values})
        places = {kind: (number + 0.5) / len(kinds) for number, kind in enumerate(kinds)}
        return ParallelAxis(
            name, lambda value: places[format_value(value)], [(place, kind) for kind, place in places.items()]
        )
    scale = math.log if logarithmic and min(values) > 0 else float
    low, high = scale(min(values)), scale(max(values))

    def place(value: float) -> float:
        return (scale(value) - low) / (high - low) if high > low else 0.5

    few = sorted(set(values))
    if len(few) > 5:
        between = np.linspace(low, high, 5)
        few = [float(np.exp(value) if scale is math.log else value) for value in between]
    return ParallelAxis(name, place, [(place(value), format_value(value)) for value in few])


def needs_log_scale(values: Sequence[float]) -> bool:
    """Return whether the range of a metric is so wide that small values are visible only on a logarithmic axis."""
    return min(values) > 0 and max(values) >= 20 * min(values)


def draw_curve(plot: Axes, heights: Sequence[float], color: Any, width: float, style: str) -> None:
    """Draw a smooth curve through (0, heights[0]), (1, heights[1]), ..., which is almost horizontal at each axis."""
    t = np.linspace(0.0, 1.0, 40)
    smooth = (1 - FLAT) * (3 * t**2 - 2 * t**3) + FLAT * t
    for left, (a, b) in enumerate(pairwise(heights)):
        plot.plot(left + t, a + (b - a) * smooth, style, color=color, linewidth=width, alpha=0.9, clip_on=False)


def draw_axis(plot: Axes, x: int, axis: ParallelAxis) -> None:
    """Draw an axis, its ticks, and its name above it."""
    plot.plot([x, x], [0, 1], color=INK, linewidth=1.0, clip_on=False)
    for place, text in axis.ticks:
        plot.plot([x, x + 0.02], [place, place], color=INK, linewidth=1.0, clip_on=False)
        box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.8}
        plot.text(x + 0.035, place, text, fontsize=8, color=INK, va="center", bbox=box)
    plot.text(x, 1.04, break_name(axis.name), fontsize=8.5, color=INK, ha="center", va="bottom")


def break_name(name: str) -> str:
    """Break a long name into lines, after dots and slashes."""
    lines = [""]
    for part in re.findall(r"[^./]*[./]?", name):
        if len(lines[-1] + part) > LETTERS and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
