"""Where a sampler stops between noise and data."""

from __future__ import annotations

from enum import Enum
from itertools import pairwise

import torch

from dvae.errors import UserError
from dvae.registry.schedules.base import Schedule

NOISE_LEVEL = 160.0
"""sigma/alpha from which log_snr and karras count on a schedule that ends beyond it, or without end.

About where DDPM's table ends (157), and EDM's sigma_max over its sigma_data (80 / 0.5): the data are lost there. The
capped cosine ends at 20,000, and karras would spend more than half of its steps above 160.
"""


class Spacing(Enum):
    """How the steps of a sampler are spread over t in [0, 1]."""

    uniform = 1
    """Even in t ("trailing" of Lin et al. 2024)."""
    quadratic = 2
    """Even in sqrt(t): finer near the data (Song et al. 2021, DDIM, appendix D.2)."""
    log_snr = 3
    """Even in log(sigma/alpha) (Lu et al. 2022, DPM-Solver)."""
    karras = 4
    """Even in (sigma/alpha)^(1/rho) (Karras et al. 2022, equation 5)."""


def time_grid(
    schedule: Schedule,
    steps: int,
    spacing: Spacing,
    t_min: float = 0.0,
    sigma_min: float = 0.002,
    rho: float = 7.0,
) -> list[float]:
    """Times from 1 down to 0: n + 1 distinct ones for n = `steps` evaluations, of which the last denoises to t = 0.

    uniform, quadratic: t_j = (j/n)^p with p = 1 or 2; with t_min above 0, n times from 1 to t_min even in t^(1/p), then
    0. log_snr, karras: n times from t = 1 to sigma/alpha = sigma_min, then 0; on a schedule that ends above
    sigma/alpha = 160 t = 1 stands where 160 would. One step is always [1, 0].

    On a schedule of discrete times these are rounded to distinct ones, so n = `steps`, or `schedule.steps` where that
    is less, and sigma_min is that of its first time, where that is more. `steps` is at least 1.

    Raises UserError where t_min is not in [0, 1), sigma_min not above 0 and below the sigma/alpha of t = 1 (160), rho
    not above 0, or where these leave no room for so many steps.
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
            f"sampler.steps={steps}: between t = 1 and t_min={t_min} or sigma_min={sigma_min} float64 has no room for "
            "so many distinct times: use fewer steps or another minimum"
        )
    return times


def _even(n: int, power: int, t_min: float) -> list[float]:
    """Times even in t^(1/power)."""
    if not 0.0 <= t_min < 1.0:
        raise UserError(f"sampler.t_min={t_min}: must be in [0, 1)")
    if t_min == 0.0 or n == 1:
        return [(j / n) ** power for j in range(n, -1, -1)]
    low = t_min ** (1.0 / power)
    return [((j + (n - 1 - j) * low) / (n - 1)) ** power for j in range(n - 1, -1, -1)] + [0.0]


def _levels(schedule: Schedule, n: int, spacing: Spacing, sigma_min: float, rho: float) -> list[float]:
    """Times even in a function of r = sigma/alpha = sqrt(exp(B) - 1)."""
    top = min(NOISE_LEVEL, _ratio(schedule, 1.0))
    if not 0.0 < sigma_min < top:
        raise UserError(f"sampler.sigma_min={sigma_min}: must be above 0 and below {top:.6g}, where the steps start")
    if not rho > 0.0:
        raise UserError(f"sampler.rho={rho}: must be above 0; Karras et al. have 7")
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
    B = schedule.integral(torch.tensor([t], dtype=torch.float64, device="cpu"))
    return float(torch.sqrt(torch.expm1(B)))


def _to_table(times: list[float], total: int) -> list[float]:
    """`times`, falling from 1 to 0, as distinct multiples of 1/total, with at most total + 1 of them.

    From 0 upwards each takes its nearest multiple, or the next one that is free, and leaves one for each that follows.
    """
    ahead = len(times) - 1
    indices = [0]
    for t in reversed(times[:-1]):
        ahead -= 1
        indices.append(min(max(indices[-1] + 1, round(total * t)), total - ahead))
    return [index / total for index in reversed(indices)]
