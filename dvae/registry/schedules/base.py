"""Schedules: the clock of a diffusion, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from dvae.registry.core import ComponentConfig, Registry, Shapes


class Schedule(ABC):
    """A clock B(t) = -log abar(t), increasing on t in [0, 1] from B(0) = 0. Tensors are float64, any shape."""

    Config: type[ComponentConfig]
    steps: int | None = None
    """Number of discrete times i/steps (i = 1..steps) that training draws from; None: t is continuous."""
    zero_terminal_snr: bool = False
    """Whether B(1) is infinite: at t = 1 nothing is left of the data, and eps says nothing of x0."""

    @abstractmethod
    def __init__(self, config: ComponentConfig, shapes: Shapes) -> None: ...

    @abstractmethod
    def integral(self, t: torch.Tensor) -> torch.Tensor:
        """B(t), the integral of beta from 0 to t."""

    @abstractmethod
    def rate(self, t: torch.Tensor) -> torch.Tensor:
        """beta(t) = dB/dt, per unit of time."""

    @abstractmethod
    def inverse(self, integral: torch.Tensor) -> torch.Tensor:
        """The t at which B(t) = integral."""

    def time_feature(self, t: torch.Tensor) -> torch.Tensor:
        """The time as a refiner sees it: t scaled to [0, 1000], where positional embeddings separate times well."""
        return 1000.0 * t


SCHEDULES: Registry[Schedule] = Registry("schedule", __package__, Schedule)
