"""The schedule with geometric noise levels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.schedules.base import SCHEDULES, Schedule


@SCHEDULES.register("geometric")
class Geometric(Schedule):
    """Geometric noise levels: VE-SDE scaled to unit variance (Song et al. 2021, equations 30 and 31).

    B = log(1 + r^2), r^2 = sigma_min^2 ((sigma_max / sigma_min)^(2t) - 1). r = sigma/alpha is the paper's noise in
    units of the data. Above sigma_min, log r is close to linear in t. The paper's experiments leave out the -1, which
    leaves noise sigma_min at t = 0. Here, as in the paper's SDE, t = 0 is clean.

    The paper's images are in [0, 1], and the images here are in [-1, 1]. With `denoiser.data_scale=0.5` the paper's
    values of sigma apply here.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        sigma_min: float = 0.01
        """sigma/alpha at which the geometric growth begins, above 0, in units of the diffused state."""
        sigma_max: float = 50.0
        """sigma/alpha at t = 1, above sigma_min, in units of the diffused state. Use about the largest distance between
        two images: 50 for CIFAR-10 in [0, 1]."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        if not 0.0 < config.sigma_min < config.sigma_max < math.inf:
            raise UserError(
                f"schedule.sigma_min={config.sigma_min}, sigma_max={config.sigma_max}: need 0 < min < max < inf"
            )
        self._min2 = config.sigma_min**2
        self._speed = 2.0 * math.log(config.sigma_max / config.sigma_min)  # of log sigma^2, per unit of time

    def integral(self, t: torch.Tensor) -> torch.Tensor:
        return torch.log1p(self._min2 * torch.expm1(self._speed * t))

    def rate(self, t: torch.Tensor) -> torch.Tensor:
        growth = torch.expm1(self._speed * t)
        return self._min2 * self._speed * (1.0 + growth) / (1.0 + self._min2 * growth)

    def inverse(self, integral: torch.Tensor) -> torch.Tensor:
        return torch.log1p(torch.expm1(integral) / self._min2) / self._speed
