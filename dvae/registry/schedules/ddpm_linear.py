"""DDPM's discrete schedule with linear beta."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.schedules.base import SCHEDULES, Schedule
from dvae.registry.schedules.zero_terminal import ZeroTerminal


@SCHEDULES.register("ddpm_linear")
class DDPMLinear(Schedule):
    """DDPM's table: evenly spaced beta_i at `steps` discrete times (Ho et al. 2020, section 4).

    Index i = 0..steps-1 of the table is t = (i + 1) / steps, so abar_i = prod_{j <= i} (1 - beta_j) = exp(-B(t)), and
    B(0) = 0. Between the table's times, B is linear in t. With zero terminal SNR, this B is rescaled at every t.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        beta_start: float = 1e-4
        """beta of the first step, in (0, 1)."""
        beta_end: float = 0.02
        """beta of the last step, in (0, 1) and at least beta_start. With fewer than 1000 steps, multiply both betas by
        1000 / steps, so that abar still ends near 0."""
        steps: int = 1000
        """Length of the table, at least 1: the number of discrete times that training draws from."""
        zero_terminal_snr: bool = False
        """Rescale B so that u is pure noise at t = 1 (Lin et al. 2024). The refiner must then predict v or x0 instead
        of eps."""

    betas: torch.Tensor
    """beta of each step, (steps,), float64."""
    abar: torch.Tensor
    """abar after each step, (steps,), float64, decreasing."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        if config.steps < 1:
            raise UserError(f"schedule.steps={config.steps}: must be at least 1")
        if not 0.0 < config.beta_start <= config.beta_end < 1.0:
            raise UserError(
                f"schedule.beta_start={config.beta_start}, beta_end={config.beta_end}: need 0 < start <= end < 1"
            )
        self.steps: int = config.steps
        self.betas = self._spread(config)
        increments = -torch.log1p(-self.betas)
        self._table = torch.cat([torch.zeros_like(increments[:1]), increments.cumsum(0)])  # B at i/steps, i = 0..steps
        self._slopes = increments * config.steps
        self.abar = torch.exp(-self._table[1:])
        self.zero_terminal_snr: bool = config.zero_terminal_snr
        self._rescaled: ZeroTerminal | None = None
        if config.zero_terminal_snr:
            times = self._time(torch.arange(config.steps + 1, device="cpu"))
            self._rescaled = ZeroTerminal(self._plain(times)[-1].item())
            table = self.integral(times)
            self.abar, self.betas = torch.exp(-table[1:]), -torch.expm1(-table.diff())

    def _spread(self, config: Config) -> torch.Tensor:
        """Return the table of beta, (steps,), float64."""
        # the device is explicit, because models are also built under the meta device, and tables need values there too
        return torch.linspace(config.beta_start, config.beta_end, config.steps, dtype=torch.float64, device="cpu")

    def _plain(self, t: torch.Tensor) -> torch.Tensor:
        """Return B without the rescaling."""
        below = torch.floor(t * self.steps).clamp(0, self.steps - 1).long()
        return self._table[below] + (t - self._time(below)) * self._slopes[below]

    def integral(self, t: torch.Tensor) -> torch.Tensor:
        return self._rescaled.integral(self._plain(t)) if self._rescaled else self._plain(t)

    def rate(self, t: torch.Tensor) -> torch.Tensor:
        """Return the slope of B at t. At a time of the table it is the slope of the step that ends there."""
        slope = self._slopes[(torch.ceil(t * self.steps) - 1).clamp(0, self.steps - 1).long()]
        return self._rescaled.rate(self._plain(t), slope) if self._rescaled else slope

    def inverse(self, integral: torch.Tensor) -> torch.Tensor:
        B = self._rescaled.inverse(integral) if self._rescaled else integral
        below = (torch.searchsorted(self._table, B) - 1).clamp(0, self.steps - 1)
        return self._time(below) + (B - self._table[below]) / self._slopes[below]

    def _time(self, index: torch.Tensor) -> torch.Tensor:
        return index.double() / self.steps  # not index / steps, because torch divides integers in float32

    def time_feature(self, t: torch.Tensor) -> torch.Tensor:
        """Return the index into the table, which is the time input of published networks: 0..999 for 1000 steps.

        For another number of steps the index is multiplied by 1000 / steps. It is 0 for times before the first time of
        the table.
        """
        return ((self.steps * t - 1.0) * (1000.0 / self.steps)).clamp(min=0.0)
