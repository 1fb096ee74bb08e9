"""The sigmoid schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.schedules.base import SCHEDULES, Schedule

FLOOR = 1e-9
"""abar at t = 1, above 0 so that B is finite. Chen 2023 (algorithm 1) clips abar at this value."""
WIDEST = 30.0
"""Largest absolute argument of the sigmoid. Beyond it, float64 cannot distinguish abar from 1 or from the floor."""


@SCHEDULES.register("sigmoid")
class Sigmoid(Schedule):
    """Sigmoid schedule abar(t) = (v_end - sigmoid(y(t))) / (v_end - v_start), y = (start + t (end - start)) / tau.

    v_start = sigmoid(y(0)), v_end = sigmoid(y(1)) (Jabri et al. 2023, algorithm 1; Chen 2023). This published abar is 0
    at t = 1. Without zero terminal SNR, the abar here is 1e-9 + (1 - 1e-9) times the published abar.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        start: float = -3.0
        """tau times the argument of the sigmoid at t = 0."""
        end: float = 3.0
        """tau times the argument of the sigmoid at t = 1; above start."""
        tau: float = 1.0
        """Temperature, above 0. start / tau and end / tau must be in [-30, 30]."""
        zero_terminal_snr: bool = False
        """Use the published abar without the floor, so that u is pure noise at t = 1. The refiner must then predict v
        or x0 instead of eps."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        start, end, tau = config.start, config.end, config.tau
        if not (tau > 0.0 and -WIDEST <= start / tau < end / tau <= WIDEST):
            raise UserError(
                f"schedule.start={start}, end={end}, tau={tau}: need tau > 0 and "
                f"-{WIDEST:g} <= start / tau < end / tau <= {WIDEST:g}"
            )
        self.zero_terminal_snr: bool = config.zero_terminal_snr
        self._floor = 0.0 if config.zero_terminal_snr else FLOOR
        self._y0, self._width = start / tau, (end - start) / tau
        self._v0, self._below_1 = _sigmoid(self._y0), _sigmoid(-end / tau)  # v_start and 1 - v_end
        self._range = self._v0 * self._below_1 * math.expm1(self._width)  # v_end - v_start

    def _shares(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (d sigmoid / dy, 1 - abar, abar) of the published curve, each without cancellation.

        It uses sigmoid(b) - sigmoid(a) = sigmoid(a) (1 - sigmoid(b)) (exp(b - a) - 1).
        """
        rise = self._width * t
        v, rest = torch.sigmoid(self._y0 + rise), torch.sigmoid(-self._y0 - rise)
        gone = self._v0 * rest * torch.expm1(rise) / self._range
        left = self._below_1 * v * torch.expm1(self._width * (1.0 - t)) / self._range
        return v * rest, gone, left

    def integral(self, t: torch.Tensor) -> torch.Tensor:
        _, gone, left = self._shares(t)
        kept = 1.0 - self._floor
        # two equal forms of -log(abar): the first is accurate for abar near 1, and the second for abar near 0
        return torch.where(gone < 0.5, -torch.log1p(-kept * gone), -torch.log(self._floor + kept * left))

    def rate(self, t: torch.Tensor) -> torch.Tensor:
        slope, _, left = self._shares(t)
        kept = 1.0 - self._floor
        return kept * self._width * slope / (self._range * (self._floor + kept * left))

    def inverse(self, integral: torch.Tensor) -> torch.Tensor:
        kept = 1.0 - self._floor
        gone, left = -torch.expm1(-integral) / kept, (torch.exp(-integral) - self._floor) / kept
        # y = log(v) - log(1 - v). Both logarithms are computed relative to their values at t = 0.
        up = torch.log1p(gone * self._range / self._v0)
        above_0 = _sigmoid(-self._y0)  # 1 - v_start
        early = torch.log1p(-gone * self._range / above_0)
        late = torch.log((self._below_1 + left * self._range) / above_0)
        return (up - torch.where(gone < 0.5, early, late)) / self._width


def _sigmoid(y: float) -> float:
    return 1.0 / (1.0 + math.exp(-y))
