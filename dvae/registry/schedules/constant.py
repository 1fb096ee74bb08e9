"""The schedule with constant beta."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.schedules.base import SCHEDULES, Schedule


@SCHEDULES.register("constant")
class Constant(Schedule):
    """Constant beta: B = beta t, the clock of PSLD (Pandey & Mandt 2023, section 4)."""

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        beta: float = 8.0
        """Noise rate per unit of time, above 0. abar(1) = exp(-beta)."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        if not 0.0 < config.beta < math.inf:
            raise UserError(f"schedule.beta={config.beta}: must be above 0 and finite; PSLD uses 8")
        self._beta = config.beta

    def integral(self, t: torch.Tensor) -> torch.Tensor:
        return self._beta * t

    def rate(self, t: torch.Tensor) -> torch.Tensor:
        return torch.full_like(t, self._beta)

    def inverse(self, integral: torch.Tensor) -> torch.Tensor:
        return integral / self._beta
