"""Processes: linear forward SDEs, each defined by three small matrices (Pandey & Mandt, ICCV 2023)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from dvae.registry.core import ComponentConfig, Registry, Shapes


class Process(ABC):
    """The linear SDE du = -(D + Q) S_inf^-1 u dB + sqrt(2 D dB) w on the clock B, for each channel.

    u has k components, and the image is the first. A process sets the three matrices, and the kernels, losses and
    samplers are derived from them.
    """

    Config: type[ComponentConfig]
    D: np.ndarray
    """Diffusion matrix, (k, k), float64, symmetric positive semi-definite."""
    Q: np.ndarray
    """(k, k), float64, skew-symmetric."""
    S_inf: np.ndarray
    """Stationary covariance, (k, k), float64, symmetric positive definite."""
    kappa: float = 0.04
    """At t = 0, the components other than the image are N(0, kappa * their block of S_inf). CLD and PSLD use 0.04."""

    @abstractmethod
    def __init__(self, config: ComponentConfig, shapes: Shapes) -> None: ...

    @property
    def k(self) -> int:
        """Number of components of the state per channel."""
        return len(self.D)

    @property
    def S_0(self) -> np.ndarray:
        """Covariance of u at t = 0 given the image, (k, k). Its first row and column are zero."""
        S_0 = self.kappa * np.asarray(self.S_inf, dtype=np.float64)
        S_0[0, :] = S_0[:, 0] = 0.0
        return S_0


PROCESSES: Registry[Process] = Registry("process", __package__, Process)
