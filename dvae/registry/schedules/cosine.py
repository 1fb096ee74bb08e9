"""The cosine schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.schedules.base import SCHEDULES, Schedule

CAP_FROM = 0.999
"""Time from which beta is capped. The cap beta <= 0.999 changes only the last of 1000 steps, because for every offset
beta is below 0.75 in the others."""
CAP_RATE = -math.log(1.0 - 0.999) * 1000.0
"""dB/dt of a step of length 1/1000 with beta = 0.999."""


@SCHEDULES.register("cosine")
class Cosine(Schedule):
    """Cosine: abar(t) = f(t) / f(0), f(t) = cos^2((t + s) / (1 + s) pi/2) (Nichol & Dhariwal 2021, equation 17).

    f(1) = 0, so the paper caps beta at 0.999 in its table of 1000 steps. The cap changes only the last step. Here B is
    linear in that step, from t = 0.999 to 1. So B agrees with the paper's table at every i/1000, and abar(1) = 2.4e-9.
    With zero terminal SNR there is no cap, and B is infinite at t = 1.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        offset: float = 0.008
        """The offset s, above 0. It keeps beta above 0 at t = 0."""
        zero_terminal_snr: bool = False
        """Leave out the cap, so that u is pure noise at t = 1. The refiner must then predict v or x0 instead of eps."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        if not config.offset > 0.0:
            raise UserError(f"schedule.offset={config.offset}: must be above 0; the paper uses 0.008")
        self._speed = 0.5 * math.pi / (1.0 + config.offset)  # of the angle, in radians per unit of time
        self._start = self._speed * config.offset  # the angle at t = 0
        self.zero_terminal_snr: bool = config.zero_terminal_snr
        self._cap = 1.0 if config.zero_terminal_snr else CAP_FROM
        # the device is explicit, because models are also built under the meta device, and .item() needs a real value
        self._B_cap = self._uncapped(torch.tensor(self._cap, dtype=torch.float64, device="cpu")).item()

    def _uncapped(self, t: torch.Tensor) -> torch.Tensor:
        """Return B without the cap: -2 log(cos(start + x) / cos(start)) with x = speed t.

        `early` and `late` are equal in exact arithmetic. `early` is accurate near t = 0, and `late` near t = 1.
        """
        x = self._speed * t
        early = -2.0 * torch.log1p(-(2.0 * torch.sin(0.5 * x) ** 2 + math.tan(self._start) * torch.sin(x)))
        late = -2.0 * torch.log(torch.sin(self._speed * (1.0 - t)) / math.cos(self._start))  # the angle ends at pi/2
        return torch.where(t < 0.5, early, late)

    def integral(self, t: torch.Tensor) -> torch.Tensor:
        return torch.where(t <= self._cap, self._uncapped(t), self._B_cap + CAP_RATE * (t - self._cap))

    def rate(self, t: torch.Tensor) -> torch.Tensor:
        uncapped = 2.0 * self._speed / torch.tan(self._speed * (1.0 - t))
        return torch.where(t <= self._cap, uncapped, torch.full_like(t, CAP_RATE))

    def inverse(self, integral: torch.Tensor) -> torch.Tensor:
        # With y = 1 - exp(-B/2) and h = tan(x/2), B = _uncapped(t) is the quadratic equation
        # (2 - y) h^2 + 2 tan(start) h - y = 0. Its positive root is written in a form without cancellation.
        y = -torch.expm1(-0.5 * integral)
        slope = math.tan(self._start)
        h = y / (slope + torch.sqrt(slope**2 + y * (2.0 - y)))
        uncapped = 2.0 * torch.atan(h) / self._speed
        return torch.where(integral <= self._B_cap, uncapped, self._cap + (integral - self._B_cap) / CAP_RATE)
