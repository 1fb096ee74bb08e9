"""An adaptive Runge-Kutta method with a separate step size for each sample (Dormand & Prince 1980).

Samples are evaluated together, but each has its own time, step size and error control. Therefore the result of a
sample, and its number of evaluations, do not depend on the rest of the batch. They would with one common step size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.integrate import RK45

from dvae.errors import UserError

C = [float(c) for c in RK45.C]
A = [[float(a) for a in row] for row in RK45.A]
B = [float(b) for b in RK45.B]
E = [float(e) for e in RK45.E]
"""The tableau: nodes C, stages A, weights B of the step of order 5, and weights E of its difference from the step of
order 4."""

SAFETY, SHRINK, GROW = 0.9, 0.2, 5.0
"""Safety factor on the step size, and the smallest and largest factor from one step size to the next (Hairer et al.,
II.4)."""
FIRST_STEP = 0.01
"""First step, as a fraction of the whole interval."""
MAX_STEP = 0.2
"""Largest step, as a fraction of the whole interval. The error estimate of a sample with few elements can vanish by
chance. Without this limit the step would then grow so far that some errors reach 200 times the tolerance."""
MIN_STEP = 1e-12
"""Step, as a fraction of the whole interval, below which `integrate` gives up."""
MAX_STEPS = 2000
"""Maximum number of attempted steps per sample."""

Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""velocity(y (n, ...), t (n,) float64 on the CPU, rows (n,) int64) returns dy/dt (n, ...) of the samples `rows` of the
batch."""


@dataclass(frozen=True)
class Solution:
    """Result of `integrate`."""

    y: torch.Tensor
    """State at the end, (B, ...)."""
    evaluations: torch.Tensor
    """Velocity evaluations of each sample, (B,), int64: 1, plus 6 for every attempted step."""


def integrate(velocity: Velocity, y: torch.Tensor, start: float, end: float, tolerance: float) -> Solution:
    """Solve dy/dt = velocity from y (B, ...) at `start` to `end`. `end` can be below `start`.

    The error estimate of a step is divided by tolerance * (1 + |y|) in each element of a sample. The sample's step is
    accepted if the root mean square of this is at most 1. A sample that has reached `end` is not evaluated any more.

    Raises UserError if a sample cannot reach `end`: its step is below MIN_STEP, or it needs more than MAX_STEPS steps.
    """
    y_end, evaluations = y.clone(), torch.ones(len(y), dtype=torch.int64)
    rows, t = torch.arange(len(y)), torch.full((len(y),), start, dtype=torch.float64)
    h, rejected = torch.full_like(t, FIRST_STEP * (end - start)), torch.zeros(len(y), dtype=torch.bool)
    slope = velocity(y, t, rows)
    for _ in range(MAX_STEPS):
        h = h.clamp(-MAX_STEP * abs(end - start), MAX_STEP * abs(end - start))
        last = h.abs() >= (end - t).abs()
        h = torch.where(last, end - t, h)
        y_new, slope_new, error = _attempt_step(velocity, y, slope, t, h, rows, tolerance)
        evaluations[rows] += 6

        kept = error <= 1.0  # a nan compares as false, so the step is rejected
        # the exponent is -1/5 because the error estimate is of order h^5; an error of 0 makes the factor infinite
        factor = torch.nan_to_num(SAFETY * error**-0.2, nan=SHRINK, posinf=GROW).clamp(SHRINK, GROW)
        # a step that is accepted right after a rejection must not grow
        factor = torch.where(rejected & kept, factor.clamp(max=1.0), factor)
        y, slope = _where(kept, y_new, y), _where(kept, slope_new, slope)
        t, h, rejected = torch.where(kept, t + h, t), h * factor, ~kept

        arrived = kept & last
        if arrived.any():
            y_end[rows[arrived]] = y[arrived]
            y, slope, t, h, rejected, rows = (x[~arrived] for x in (y, slope, t, h, rejected, rows))
        if not len(rows):
            return Solution(y_end, evaluations)
        if (h.abs() < MIN_STEP * abs(end - start)).any():
            break
    worst = int(h.abs().argmin())
    raise UserError(
        f"tolerance={tolerance:g} cannot be met: sample {int(rows[worst])} is stuck between {start:g} and {end:g} at "
        f"{t[worst]:g} with steps of {h[worst].abs():.1e}; use a larger tolerance or fp32, and check that the model's "
        "predictions are finite"
    )


def _attempt_step(
    velocity: Velocity,
    y: torch.Tensor,
    slope: torch.Tensor,
    t: torch.Tensor,
    h: torch.Tensor,
    rows: torch.Tensor,
    tolerance: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Take one step of h (n,) for each sample.

    Returns (y (n, ...), slope at the new y (n, ...), error / tolerated error (n,) float64 on the CPU).
    """
    step = h.to(y.device, y.dtype).view(-1, *[1] * (y.ndim - 1))
    slopes = [slope]
    for c, a in zip(C[1:], A[1:], strict=True):
        slopes.append(velocity(y + step * _sum(a, slopes), t + c * h, rows))
    y_new = y + step * _sum(B, slopes)
    slopes.append(velocity(y_new, t + h, rows))
    tolerated = tolerance * (1.0 + torch.maximum(y.abs(), y_new.abs()))
    error = (step * _sum(E, slopes) / tolerated).flatten(1).double().square().mean(1).sqrt()
    return y_new, slopes[-1], error.cpu()


def _sum(weights: list[float], slopes: list[torch.Tensor]) -> torch.Tensor:
    """Return the weighted sum of slopes. Weights without a slope are ignored; they are zero in the tableau."""
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=False):
        total = total + weight * slope
    return total


def _where(chosen: torch.Tensor, there: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """Return the samples of `there` (n, ...) if `chosen` (n,) is true, else the samples of `here` (n, ...)."""
    return torch.where(chosen.to(here.device).view(-1, *[1] * (here.ndim - 1)), there, here)
