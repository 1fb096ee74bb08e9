"""Draw line charts as inline SVG. The CSS of the page sets colors and fonts, so charts follow light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 280
LEFT, RIGHT, TOP, BOTTOM = 66, 24, 12, 52
MOST_POINTS = 240
LARGEST = 1e150
"""Points with a larger absolute value are left out, because the computation of the axes would overflow."""


@dataclass(frozen=True)
class Line:
    """One curve: a name for the legend, and points (x, y) in order of x."""

    name: str
    points: Sequence[tuple[float, float]]


def line_chart(lines: Sequence[Line], x_label: str, y_label: str, dots: bool = False) -> str:
    """Return an <svg> element with up to four lines, or "" if no point is finite.

    The y axis is logarithmic if all y are positive and the largest is at least 5 times the smallest. Long curves are
    averaged down to 240 points. A legend is drawn if there is more than one line. Names and labels are escaped.
    """
    lines = [Line(line.name, _thin([p for p in line.points if all(map(_drawable, p))])) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    logarithmic = min(ys) > 0 and max(ys) >= 5 * min(ys)
    y_ticks = log_ticks(min(ys), max(ys)) if logarithmic else linear_ticks(min(ys), max(ys))
    x_ticks = linear_ticks(min(xs), max(xs))
    y_low, y_high = min(*ys, *y_ticks), max(*ys, *y_ticks)
    place_x = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT, float)
    place_y = _scale(y_low, y_high, HEIGHT - BOTTOM, TOP, math.log10 if logarithmic else float)
    parts = [_axes(x_ticks, y_ticks, place_x, place_y, x_label, y_label + (" (log)" if logarithmic else ""))]
    for number, line in enumerate(lines):
        parts.append(_curve(number, [(place_x(x), place_y(y)) for x, y in line.points], dots))
    if len(lines) > 1:
        parts.append(_legend([line.name for line in lines]))
    label = escape(f"{y_label} against {x_label}: {', '.join(line.name for line in lines)}", quote=True)
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _drawable(value: float) -> bool:
    return math.isfinite(value) and abs(value) <= LARGEST


def linear_ticks(low: float, high: float) -> list[float]:
    """Return three to seven round values within [low, high]. Their spacing is 1, 2 or 5 times a power of ten."""
    span = next((span for span in (high - low, abs(high)) if span > 1 / LARGEST), 1.0)
    power = 10.0 ** math.floor(math.log10(span / 3))
    step = next(f * power for f in (5, 2, 1) if span / (f * power) >= 3 or f == 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)] or [low]


def log_ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten within [low, high]. If there are fewer than three, add 2 and 5 times powers of ten."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        ticks = [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]
        if len(ticks) >= 3:
            return ticks[:: -(-len(ticks) // 6)]
    return ticks or [low, high]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighboring points, so that at most MOST_POINTS are left."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return points
    chunks = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in c) / len(c), sum(y for _, y in c) / len(c)) for c in chunks]


def _scale(
    low: float, high: float, start: float, end: float, transform: Callable[[float], float]
) -> Callable[[float], float]:
    """Return the map from values to pixels: `low` to `start` and `high` to `end`.

    If `low` equals `high`, every value is mapped to the middle. `transform` is applied first (log10 or float).
    """
    a, b = transform(low), transform(high)
    if a == b:
        return lambda value: (start + end) / 2
    return lambda value: start + (transform(value) - a) / (b - a) * (end - start)


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    x_label: str,
    y_label: str,
) -> str:
    parts = []
    for tick in y_ticks:
        y = place_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 5:.1f}" text-anchor="end">{tick_label(tick)}</text>')
    for tick in x_ticks:
        parts.append(
            f'<text x="{place_x(tick):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tick_label(tick)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    parts.append(f'<text class="name" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    height = (TOP + HEIGHT - BOTTOM) / 2
    turned = f'transform="rotate(-90 14 {height})" text-anchor="middle"'
    parts.append(f'<text class="name" x="14" y="{height}" {turned}>{escape(y_label)}</text>')
    return "".join(parts)


def _curve(index: int, points: Sequence[tuple[float, float]], dots: bool) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    shape = f'<polyline class="line c{index % 4}" points="{path}"/>'
    if dots or len(points) == 1:
        shape += "".join(f'<circle class="dot c{index % 4}" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>' for x, y in points)
    return shape


def _legend(names: Sequence[str]) -> str:
    """Draw the names at the top right, one below the other, each after a swatch of its color."""
    width = 20 + 7.5 * max(map(len, names))
    left = WIDTH - RIGHT - width
    parts = [f'<rect class="plate" x="{left - 6}" y="{TOP - 4}" width="{width + 6}" height="{20 * len(names) + 4}"/>']
    for i, name in enumerate(names):
        y = TOP + 11 + 20 * i
        parts.append(f'<rect class="dot c{i % 4}" x="{left}" y="{y - 5}" width="10" height="4" rx="2"/>')
        parts.append(f'<text x="{left + 16}" y="{y + 1}">{escape(name)}</text>')
    return "".join(parts)


def tick_label(value: float) -> str:
    """Format the label of a tick: 0.001, 2.5, 400, 20k, 3M."""
    for factor, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= 10 * factor or (abs(value) >= factor and factor == 1e6):
            return f"{value / factor:.3g}{unit}"
    return f"{value:.4g}"
