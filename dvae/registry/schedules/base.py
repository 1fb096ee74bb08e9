"""Schedules: the clock B(t) of a diffusion."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from dvae.registry.core import ComponentConfig, Registry, Shapes


class Schedule(ABC):
    """A clock B(t) = -log abar(t), which increases on t in [0, 1] from B(0) = 0.

    The methods take and return float64 tensors of any shape.
    """

    Config: type[ComponentConfig]
    steps: int | None = None
    """Number of discrete times i/steps (i = 1..steps) that training draws from. None: t is continuous."""
    zero_terminal_snr: bool = False
    """Whether B(1) is infinite. Then u at t = 1 is pure noise, and eps does not determine x0 there."""

    @abstractmethod
    def __init__(self, config: ComponentConfig, shapes: Shapes) -> None: ...

    @abstractmethod
    def integral(self, t: torch.Tensor) -> torch.Tensor:
        """Return B(t), the integral of beta from 0 to t."""

    @abstractmethod
    def rate(self, t: torch.Tensor) -> torch.Tensor:
        """Return beta(t) = dB/dt, per unit of time."""

    @abstractmethod
    def inverse(self, integral: torch.Tensor) -> torch.Tensor:
        """Return the t at which B(t) = integral."""

    def time_feature(self, t: torch.Tensor) -> torch.Tensor:
        """Return the time input of a refiner, in [0, 1000].

        Positional embeddings distinguish times well on this scale.
        """
        return 1000.0 * t


SCHEDULES: Registry[Schedule] = Registry("schedule", __package__, Schedule)
