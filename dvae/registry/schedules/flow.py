"""The schedule of rectified flow and flow matching."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.schedules.base import SCHEDULES, Schedule


@SCHEDULES.register("flow")
class FlowMatching(Schedule):
    """Straight paths: sigma/alpha = r(t) = t / (1 - t), B = log(1 + r^2) (Liu et al. 2023; Lipman et al. 2023).

    The papers' x_t = (1 - t) x0 + t eps, scaled to unit variance, is the state u_t here. `shift` replaces t by
    t' = shift t / (1 + (shift - 1) t) (Esser et al. 2024, equation 23). So r = shift t / (1 - t). B is infinite at
    t = 1.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        shift: float = 1.0
        """Factor on sigma/alpha, above 0. Values above 1 spend more time at high noise, which large images need. SD3
        uses 3."""

    zero_terminal_snr: bool = True

    def __init__(self, config: Config, shapes: Shapes) -> None:
        if not 0.0 < config.shift < math.inf:
            raise UserError(f"schedule.shift={config.shift}: must be above 0 and finite; 1 is no shift, SD3 uses 3")
        self._shift = config.shift

    def integral(self, t: torch.Tensor) -> torch.Tensor:
        return torch.log1p((self._shift * t / (1.0 - t)) ** 2)

    def rate(self, t: torch.Tensor) -> torch.Tensor:
        signal, noise = 1.0 - t, self._shift * t  # proportional to alpha and sigma
        return 2.0 * self._shift * noise / (signal * (signal**2 + noise**2))

    def inverse(self, integral: torch.Tensor) -> torch.Tensor:
        r = torch.sqrt(torch.expm1(integral))
        return 1.0 / (1.0 + self._shift / r)

    def time_feature(self, t: torch.Tensor) -> torch.Tensor:
        """Return 1000 t'.

        A noise level has the same t' for every shift, so a trained refiner can be used with another shift.
        """
        return 1000.0 * self._shift * t / (1.0 + (self._shift - 1.0) * t)
