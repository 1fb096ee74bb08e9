"""The grid of times that a sampler steps through, from noise to data."""

from __future__ import annotations

from enum import Enum
from itertools import pairwise

import torch

from dvae.errors import UserError
from dvae.registry.schedules.base import Schedule

NOISE_LEVEL = 160.0
"""Largest sigma/alpha of the spacings log_snr and karras, if the schedule's own sigma/alpha at t = 1 is above it.

At this noise level almost nothing is left of the data. It is close to the end of DDPM's table (157), and equal to EDM's
sigma_max over its sigma_data (80 / 0.5). The capped cosine schedule ends at 20,000, and without this limit karras would
spend more than half of its steps above 160.
"""


class Spacing(Enum):
    """The spacing of a sampler's times over t in [0, 1]."""

    uniform = 1
    """Evenly spaced in t ("trailing" of Lin et al. 2024)."""
    quadratic = 2
    """Evenly spaced in sqrt(t), so finer near the data (Song et al. 2021, DDIM, appendix D.2)."""
    log_snr = 3
    """Evenly spaced in log(sigma/alpha) (Lu et al. 2022, DPM-Solver)."""
    karras = 4
    """Evenly spaced in (sigma/alpha)^(1/rho) (Karras et al. 2022, equation 5)."""


def time_grid(
    schedule: Schedule,
    steps: int,
    spacing: Spacing,
    t_min: float = 0.0,
    sigma_min: float = 0.002,
    rho: float = 7.0,
) -> list[float]:
    """Return n + 1 distinct times that decrease from 1 to 0. They give n = `steps` steps, the last one to t = 0.

    - uniform, quadratic: t_j = (j/n)^p with p = 1 or 2. If t_min is above 0, there are n times from 1 to t_min, evenly
      spaced in t^(1/p), and then 0.
    - log_snr, karras: n times from t = 1 to sigma/alpha = sigma_min, and then 0. If the schedule's sigma/alpha at t = 1
      is above 160, the spacing is computed from 160 and its first time is replaced by t = 1.
    - One step gives [1, 0] for every spacing.

    If the schedule has discrete times, the times are rounded to distinct entries of its table. Then n is at most
    `schedule.steps`, and for log_snr and karras sigma_min is at least the sigma/alpha of the first entry.

    Args:
        schedule: The schedule that defines sigma/alpha and the discrete times.
        steps: Number of steps, at least 1.
        spacing: The spacing of the times.
        t_min: Last time before 0, in [0, 1), for uniform and quadratic. With 0 the grid is spread down to 0 itself.
        sigma_min: sigma/alpha at the last time before 0, for log_snr and karras.
        rho: Exponent of karras, above 0.

    Raises UserError in these cases:

    - t_min is not in [0, 1).
    - sigma_min is not above 0 and below the first sigma/alpha, which is at most 160.
    - rho is not above 0.
    - float64 cannot represent so many distinct times.
    """
    total = schedule.steps
    n = steps if total is None else min(steps, total)
    if spacing in (Spacing.uniform, Spacing.quadratic):
        times = _even(n, spacing.value, t_min)
    else:
        times = _levels(schedule, n, spacing, sigma_min, rho)
    if total is not None:
        return _to_table(times, total)
    if not all(t > s for t, s in pairwise(times)):
        raise UserError(
            f"sampler.steps={steps}: float64 cannot represent so many distinct times between t = 1 and t_min={t_min} "
            f"or sigma_min={sigma_min}: use fewer steps or another minimum"
        )
    return times


def _even(n: int, power: int, t_min: float) -> list[float]:
    """Return n + 1 times from 1 to 0, evenly spaced in t^(1/power)."""
    if not 0.0 <= t_min < 1.0:
        raise UserError(f"sampler.t_min={t_min}: must be in [0, 1)")
    if t_min == 0.0 or n == 1:
        return [(j / n) ** power for j in range(n, -1, -1)]
    low = t_min ** (1.0 / power)
    return [((j + (n - 1 - j) * low) / (n - 1)) ** power for j in range(n - 1, -1, -1)] + [0.0]


def _levels(schedule: Schedule, n: int, spacing: Spacing, sigma_min: float, rho: float) -> list[float]:
    """Return times from 1 to 0, evenly spaced in a function of r = sigma/alpha = sqrt(exp(B) - 1)."""
    top = min(NOISE_LEVEL, _ratio(schedule, 1.0))
    if not 0.0 < sigma_min < top:
        raise UserError(f"sampler.sigma_min={sigma_min}: must be above 0 and below {top:.6g}, where the steps start")
    if not rho > 0.0:
        raise UserError(f"sampler.rho={rho}: must be above 0; Karras et al. use 7")
    if n == 1:
        return [1.0, 0.0]
    if schedule.steps is not None:
        sigma_min = max(sigma_min, _ratio(schedule, 1.0 / schedule.steps))
    share = torch.arange(n, dtype=torch.float64, device="cpu") / (n - 1)
    if spacing is Spacing.log_snr:
        r = top * (sigma_min / top) ** share
    else:
        low, high = sigma_min ** (1.0 / rho), top ** (1.0 / rho)
        r = (high + share * (low - high)) ** rho
    return [1.0, *schedule.inverse(torch.log1p(r**2))[1:].tolist(), 0.0]


def _ratio(schedule: Schedule, t: float) -> float:
    """Return sigma/alpha at time t."""
    B = schedule.integral(torch.tensor([t], dtype=torch.float64, device="cpu"))
    return float(torch.sqrt(torch.expm1(B)))


def _to_table(times: list[float], total: int) -> list[float]:
    """Round `times`, which decrease from 1 to 0, to distinct multiples of 1/total. There are at most total + 1 times.

    From 0 upwards, each time takes its nearest multiple, or the next free one. It leaves at least one multiple for each
    time that follows.
    """
    ahead = len(times) - 1
    indices = [0]
    for t in reversed(times[:-1]):
        ahead -= 1
        indices.append(min(max(indices[-1] + 1, round(total * t)), total - ahead))
    return [index / total for index in reversed(indices)]
