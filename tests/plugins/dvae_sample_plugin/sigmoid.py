"""One component in one file: the sigmoid schedule of Jabri et al. (2023), as a stranger would add it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.schedules.base import SCHEDULES, Schedule


@SCHEDULES.register("sigmoid_sample")
class SigmoidSample(Schedule):
    """abar(t) falls along a sigmoid (Jabri et al. 2023, algorithm 1)."""

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        start: float = -3.0
        """Argument of the sigmoid at t = 0."""
        end: float = 3.0
        """Argument of the sigmoid at t = 1."""
        floor: float = 1e-4
        """abar at t = 1, above 0 so that B stays finite."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        self.start, self.end, self.floor = config.start, config.end, config.floor

    def _fall(self, t: torch.Tensor) -> torch.Tensor:
        """(abar, d abar / dt)."""
        low, high = (torch.sigmoid(torch.tensor(v, dtype=torch.float64)) for v in (self.start, self.end))
        s = torch.sigmoid(self.start + t.double() * (self.end - self.start))
        share = (high - s) / (high - low)
        slope = -s * (1 - s) * (self.end - self.start) / (high - low)
        return torch.stack([self.floor + (1 - self.floor) * share, (1 - self.floor) * slope])

    def integral(self, t: torch.Tensor) -> torch.Tensor:
        return -torch.log(self._fall(t)[0])

    def rate(self, t: torch.Tensor) -> torch.Tensor:
        abar, slope = self._fall(t)
        return -slope / abar

    def inverse(self, integral: torch.Tensor) -> torch.Tensor:
        low, high = (torch.sigmoid(torch.tensor(v, dtype=torch.float64)) for v in (self.start, self.end))
        share = (torch.exp(-integral.double()) - self.floor) / (1 - self.floor)
        return (torch.logit(high - share * (high - low)) - self.start) / (self.end - self.start)
