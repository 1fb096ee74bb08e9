"""The linear schedule in continuous time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.schedules.base import SCHEDULES, Schedule
from dvae.registry.schedules.zero_terminal import ZeroTerminal


@SCHEDULES.register("linear")
class Linear(Schedule):
    """Linear beta: B = beta_min t + (beta_max - beta_min) t^2 / 2, VP-SDE (Song et al. 2021, equations 32 and 33).

    It is the limit for n to infinity of `ddpm_linear` with steps = n, beta_start = beta_min / n, beta_end =
    beta_max / n.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        beta_min: float = 0.1
        """beta at t = 0, per unit of time, above 0."""
        beta_max: float = 20.0
        """beta at t = 1, per unit of time, at least beta_min."""
        zero_terminal_snr: bool = False
        """Rescale B so that u is pure noise at t = 1 (Lin et al. 2024). The refiner must then predict v or x0 instead
        of eps."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        if not 0.0 < config.beta_min <= config.beta_max < math.inf:
            raise UserError(
                f"schedule.beta_min={config.beta_min}, beta_max={config.beta_max}: need 0 < min <= max < inf"
            )
        self._low, self._rise = config.beta_min, config.beta_max - config.beta_min
        self._rescaled = ZeroTerminal(self._low + 0.5 * self._rise) if config.zero_terminal_snr else None
        self.zero_terminal_snr: bool = config.zero_terminal_snr

    def _plain(self, t: torch.Tensor) -> torch.Tensor:
        """Return B without the rescaling."""
        return (self._low + 0.5 * self._rise * t) * t

    def integral(self, t: torch.Tensor) -> torch.Tensor:
        return self._rescaled.integral(self._plain(t)) if self._rescaled else self._plain(t)

    def rate(self, t: torch.Tensor) -> torch.Tensor:
        rate = self._low + self._rise * t
        return self._rescaled.rate(self._plain(t), rate) if self._rescaled else rate

    def inverse(self, integral: torch.Tensor) -> torch.Tensor:
        B = self._rescaled.inverse(integral) if self._rescaled else integral
        # the root of a quadratic equation, in the form without cancellation at small B
        return 2.0 * B / (self._low + torch.sqrt(self._low**2 + 2.0 * self._rise * B))
