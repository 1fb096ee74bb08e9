"""The variance-preserving process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.processes.base import PROCESSES, Process


@PROCESSES.register("vp")
class VariancePreserving(Process):
    """Variance-preserving process: du = -u/2 dB + sqrt(dB) w.

    It is DDPM in continuous time (Song et al. 2021, equation 11).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        pass

    def __init__(self, config: Config, shapes: Shapes) -> None:
        self.D = np.array([[0.5]])
        self.Q = np.array([[0.0]])
        self.S_inf = np.array([[1.0]])
