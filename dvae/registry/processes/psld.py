"""Phase-space Langevin diffusion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.processes.base import PROCESSES, Process


@PROCESSES.register("psld")
class PSLD(Process):
    """Phase-space Langevin diffusion of image x and momentum m, critically damped (Pandey & Mandt 2023, section 3.3).

    D = diag(gamma, M nu) / 2, Q = [[0, -1], [1, 0]] / 2, S_inf = diag(1, M), 1/M = (nu - gamma)^2 / 4. The paper's
    clock is schedule=constant. With gamma > 0 the process also adds noise to x itself. gamma = 0 and nu = 4 is CLD.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        gamma: float = 0.01
        """Friction of x, 0 or more. 0.01 for CIFAR-10, 0.005 for CelebA-64."""
        nu: float = 4.01
        """Friction of the momentum m, 0 or more. It must differ from gamma."""
        kappa: float = 0.04
        """Initial variance of m in units of M, above 0: m_0 ~ N(0, kappa M)."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        if min(config.gamma, config.nu) < 0.0 or config.gamma == config.nu:
            raise UserError(
                f"process.gamma={config.gamma}, nu={config.nu}: both must be 0 or more, and they must differ"
            )
        if not config.kappa > 0.0:
            raise UserError(f"process.kappa={config.kappa}: must be above 0; the paper uses 0.04")
        M = 4.0 / (config.nu - config.gamma) ** 2
        self.D = 0.5 * np.diag([config.gamma, M * config.nu])
        self.Q = 0.5 * np.array([[0.0, -1.0], [1.0, 0.0]])
        self.S_inf = np.diag([1.0, M])
        self.kappa = config.kappa
