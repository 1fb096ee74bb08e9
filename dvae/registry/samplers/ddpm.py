"""Ancestral sampling of DDPM."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from dvae.diffusion.kernels import Diffusion
from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.samplers.base import SAMPLERS, Sampler, SamplerState


class Variance(Enum):
    """The variance of the noise that one reverse step from t to s adds (Ho et al. 2020, section 3.2)."""

    fixedlarge = 1
    """1 - abar_t / abar_s, which is beta_t between neighbors in the table. It is exact for data ~ N(0, I)."""
    fixedsmall = 2
    """Variance of q(u_s | u_t, x0). It is exact for data that are a single point."""


@SAMPLERS.register("ddpm")
class DDPM(Sampler):
    """Ancestral sampling: u_s ~ q(u_s | u_t, x0(u_t)) (Ho et al. 2020, algorithm 2), over any subset of the times.

    The last step, to t = 0, adds no noise and returns x0. So the first entries of the variance tables are never used:
    "fixedlarge" = [posterior_variance[1], beta[1:]] and "fixedsmall", which is clipped at index 0.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Sampler.Config):
        steps: int = 1000
        """Number of steps, including the last one to t = 0. A schedule with discrete times limits it to their
        number."""
        variance: Variance = Variance.fixedlarge
        """Variance of the noise of each step: fixedlarge | fixedsmall."""
        sigma_scale: float = 1.0
        """Factor on the standard deviation of the noise of each step, 0 or more. 0.95 gives sharper but less varied
        images."""

    config: Config

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        if config.sigma_scale < 0.0:
            raise UserError(f"sampler.sigma_scale={config.sigma_scale}: must be 0 or more; 1 is DDPM")

    def supports(self, diffusion: Diffusion) -> bool:
        return diffusion.k == 1

    def step(self, state: SamplerState, u: torch.Tensor, t: float, s: float) -> torch.Tensor:
        x0 = state.predict(u, t).x0
        c_x0, c_u, variance = (value.item() for value in state.diffusion.posterior(s, t))
        if self.config.variance is Variance.fixedlarge:
            variance = state.diffusion.transition(s, t)[1].item()
        return c_x0 * x0 + c_u * u + self.config.sigma_scale * variance**0.5 * state.noise(state.i)
