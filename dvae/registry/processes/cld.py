"""Critically damped Langevin diffusion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.processes.base import PROCESSES, Process


@PROCESSES.register("cld")
class CLD(Process):
    """Critically damped Langevin diffusion, with friction 4 and mass 1/4 (Dockhorn et al. 2022, section 3.1).

    Noise enters only the momentum, so the network predicts one component. The paper's clock is schedule=constant. Its
    beta is half of the beta here: beta = 4 in the paper is schedule.beta=8.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        kappa: float = 0.04
        """Initial variance of the momentum m in units of M = 1/4, above 0: m_0 ~ N(0, kappa M)."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        if not config.kappa > 0.0:
            raise UserError(f"process.kappa={config.kappa}: must be above 0; the paper uses 0.04")
        M = 0.25
        self.D = 0.5 * np.diag([0.0, 4.0 * M])
        self.Q = 0.5 * np.array([[0.0, -1.0], [1.0, 0.0]])
        self.S_inf = np.diag([1.0, M])
        self.kappa = config.kappa
