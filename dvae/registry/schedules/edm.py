"""EDM's schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.schedules.base import SCHEDULES, Schedule

FEATURE_FROM = 0.002
"""Karras et al.'s sigma_min (table 1): below it the refiner is told nothing new."""


@SCHEDULES.register("edm")
class EDM(Schedule):
    """EDM's noise levels: sigma/alpha = r(t) = sigma_max t^rho, B = log(1 + r^2) (Karras et al. 2022, equation 5).

    Even steps in t are their time steps with sigma_min = 0. sigma is in units of the diffused state: where
    `denoiser.data_scale` multiplies the images (1 / sigma_data in their terms), multiply sigma_max as well.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        sigma_max: float = 80.0
        """sigma/alpha at t = 1, above 0.002."""
        rho: float = 7.0
        """Power, at least 1: the larger, the finer the steps near the data."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        if not FEATURE_FROM < config.sigma_max < math.inf:
            raise UserError(
                f"schedule.sigma_max={config.sigma_max}: must be above {FEATURE_FROM} and finite; EDM has 80"
            )
        if not 1.0 <= config.rho < math.inf:
            raise UserError(f"schedule.rho={config.rho}: must be 1 or more and finite; EDM has 7")
        self._max, self._rho = config.sigma_max, config.rho

    def integral(self, t: torch.Tensor) -> torch.Tensor:
        return torch.log1p((self._max * t**self._rho) ** 2)

    def rate(self, t: torch.Tensor) -> torch.Tensor:
        r2 = (self._max * t**self._rho) ** 2
        return 2.0 * self._rho * self._max**2 * t ** (2.0 * self._rho - 1.0) / (1.0 + r2)

    def inverse(self, integral: torch.Tensor) -> torch.Tensor:
        return (torch.sqrt(torch.expm1(integral)) / self._max) ** (1.0 / self._rho)

    def time_feature(self, t: torch.Tensor) -> torch.Tensor:
        """EDM's ln(sigma) / 4, mapped affinely from sigma in [0.002, sigma_max] to [0, 1000]; 0 for less noise."""
        share = 1.0 + self._rho * torch.log(t) / math.log(self._max / FEATURE_FROM)
        return (1000.0 * share).clamp(min=0.0)
