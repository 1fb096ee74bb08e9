"""The schedule of EDM."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.schedules.base import SCHEDULES, Schedule

FEATURE_FROM = 0.002
"""sigma_min of Karras et al. (table 1). The refiner's time input is constant for smaller sigma."""


@SCHEDULES.register("edm")
class EDM(Schedule):
    """EDM's noise levels: sigma/alpha = r(t) = sigma_max t^rho, B = log(1 + r^2) (Karras et al. 2022, equation 5).

    Evenly spaced t are the paper's time steps with sigma_min = 0. sigma is in units of the diffused state. So if
    `denoiser.data_scale` (1 / sigma_data in the paper) is not 1, multiply sigma_max by it too.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        sigma_max: float = 80.0
        """sigma/alpha at t = 1, above 0.002, in units of the diffused state."""
        rho: float = 7.0
        """Exponent, at least 1. Larger values give finer steps near the data."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        if not FEATURE_FROM < config.sigma_max < math.inf:
            raise UserError(
                f"schedule.sigma_max={config.sigma_max}: must be above {FEATURE_FROM} and finite; EDM uses 80"
            )
        if not 1.0 <= config.rho < math.inf:
            raise UserError(f"schedule.rho={config.rho}: must be 1 or more and finite; EDM uses 7")
        self._max, self._rho = config.sigma_max, config.rho

    def integral(self, t: torch.Tensor) -> torch.Tensor:
        return torch.log1p((self._max * t**self._rho) ** 2)

    def rate(self, t: torch.Tensor) -> torch.Tensor:
        r2 = (self._max * t**self._rho) ** 2
        return 2.0 * self._rho * self._max**2 * t ** (2.0 * self._rho - 1.0) / (1.0 + r2)

    def inverse(self, integral: torch.Tensor) -> torch.Tensor:
        return (torch.sqrt(torch.expm1(integral)) / self._max) ** (1.0 / self._rho)

    def time_feature(self, t: torch.Tensor) -> torch.Tensor:
        """Return EDM's ln(sigma) / 4, mapped affinely from sigma in [0.002, sigma_max] to [0, 1000].

        It is 0 for sigma below 0.002.
        """
        share = 1.0 + self._rho * torch.log(t) / math.log(self._max / FEATURE_FROM)
        return (1000.0 * share).clamp(min=0.0)
