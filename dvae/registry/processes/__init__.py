"""Processes: linear forward SDEs, each given by three small matrices (Pandey & Mandt, ICCV 2023)."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from dvae.registry.core import ComponentConfig, Registry, Shapes


class Process(ABC):
    """du = -(D + Q) S_inf^-1 u dB + sqrt(2 D dB) w on the clock B, per channel; u has k components.

    `D` (k, k) positive semi-definite, `Q` (k, k) skew-symmetric and `S_inf` (k, k) the stationary covariance, float64.
    """

    Config: type[ComponentConfig]
    D: np.ndarray
    Q: np.ndarray
    S_inf: np.ndarray

    @abstractmethod
    def __init__(self, config: ComponentConfig, io: Shapes) -> None: ...

    @property
    def k(self) -> int:
        """Components of the state per channel."""
        return len(self.D)


PROCESSES: Registry[Process] = Registry("process", __name__)
