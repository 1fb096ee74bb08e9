"""Where a sampler stops between noise and data."""

from __future__ import annotations

from enum import Enum

from dvae.registry.schedules import Schedule


class Spacing(Enum):
    """How the steps of a sampler are spread over t in [0, 1]."""

    uniform = 1
    """Even in t ("trailing" of Lin et al. 2024)."""
    quadratic = 2
    """Even in sqrt(t): finer near the data (Song et al. 2021, DDIM, appendix D.2)."""


def time_grid(schedule: Schedule, steps: int, spacing: Spacing) -> list[float]:
    """Times from 1 down to 0: n + 1 of them for n evaluations, t_j = (j/n)^p with p = 1 (uniform) or 2 (quadratic).

    On a schedule of discrete times the t_j are rounded to distinct ones, so n = `steps`, or `schedule.steps` where that
    is less. `steps` is at least 1.
    """
    total = schedule.steps
    if total is None:
        return [(j / steps) ** spacing.value for j in range(steps, -1, -1)]
    n = min(steps, total)
    indices = [0]
    for j in range(1, n + 1):
        indices.append(max(indices[-1] + 1, round(total * (j / n) ** spacing.value)))
    return [index / total for index in reversed(indices)]
