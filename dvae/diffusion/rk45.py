"""An adaptive Runge-Kutta method whose samples keep their own step sizes (Dormand & Prince 1980).

Samples are evaluated together, but each has its own time, step and error control. So what becomes of a sample, and how
many evaluations it takes, does not depend on the batch it is in, as it does where one step size serves all.
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
"""The tableau: nodes, stages, the step of order 5, and its difference from that of order 4."""

SAFETY, SHRINK, GROW = 0.9, 0.2, 5.0
"""Aim below the tolerance, and the least and greatest factor from one step size to the next (Hairer et al., II.4)."""
FIRST_STEP = 0.01
"""First step, as a share of the whole way."""
MAX_STEP = 0.2
"""Largest step, as a share of the whole way. The error estimate of a sample of few elements may vanish by chance; were
steps free to grow while it does, some samples would be off by 200 times the tolerance."""
MIN_STEP = 1e-12
"""Step, as a share of the whole way, below which there is no hope."""
MAX_STEPS = 2000
"""Steps tried per sample."""

Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""velocity(y (n, ...), t (n,) float64 on the CPU, rows (n,) int64): dy/dt of the samples `rows` of the batch."""


@dataclass(frozen=True)
class Solution:
    y: torch.Tensor
    """State at the end, (B, ...)."""
    evaluations: torch.Tensor
    """Evaluations of the velocity that each sample took, (B,), int64: 1 + 6 for every step tried."""


def integrate(velocity: Velocity, y: torch.Tensor, start: float, end: float, tolerance: float) -> Solution:
    """Solve dy/dt = velocity from y (B, ...) at `start` to `end`, in either direction.

    A step is kept where the root mean square, over a sample's elements, of its estimated error is at most
    tolerance * (1 + |y|). A sample that has arrived is evaluated no more. Raises UserError where one cannot arrive.
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

        kept = error <= 1.0  # not where it is nan
        factor = torch.nan_to_num(SAFETY * error**-0.2, nan=SHRINK, posinf=GROW).clamp(SHRINK, GROW)
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
    """(y (n, ...), slope there (n, ...), error / tolerated error (n,)) one step of h (n,) further."""
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
    """The weighted sum; weights beyond the slopes there are do not count (they are zero in the tableau)."""
    total = weights[0] * slopes[0]
    for weight, slope in zip(weights[1:], slopes[1:], strict=False):
        total = total + weight * slope
    return total


def _where(chosen: torch.Tensor, there: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    return torch.where(chosen.to(here.device).view(-1, *[1] * (here.ndim - 1)), there, here)
