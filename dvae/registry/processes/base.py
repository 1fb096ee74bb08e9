"""Processes: linear forward SDEs, each given by three small matrices (Pandey & Mandt, ICCV 2023)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from dvae.registry.core import ComponentConfig, Registry, Shapes


class Process(ABC):
    """du = -(D + Q) S_inf^-1 u dB + sqrt(2 D dB) w on the clock B, per channel; u has k components, the image first.

    `D` (k, k) symmetric positive semi-definite, `Q` (k, k) skew-symmetric and `S_inf` (k, k) the stationary covariance,
    symmetric positive definite; float64. From these three follow kernels, losses and every sampler.
    """

    Config: type[ComponentConfig]
    D: np.ndarray
    Q: np.ndarray
    S_inf: np.ndarray
    kappa: float = 0.04
    """At t = 0 the components beside the image are N(0, kappa * their block of S_inf) (CLD and PSLD: 0.04)."""

    @abstractmethod
    def __init__(self, config: ComponentConfig, shapes: Shapes) -> None: ...

    @property
    def k(self) -> int:
        """Components of the state per channel."""
        return len(self.D)

    @property
    def S_0(self) -> np.ndarray:
        """Covariance of u at t = 0 given the image, (k, k): zero in its first row and column."""
        S_0 = self.kappa * np.asarray(self.S_inf, dtype=np.float64)
        S_0[0, :] = S_0[:, 0] = 0.0
        return S_0


PROCESSES: Registry[Process] = Registry("process", __package__, Process)
