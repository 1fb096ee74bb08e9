"""Ancestral sampling of DDPM."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.samplers import SAMPLERS, Model, Noise, OnStep, Sampled, Sampler
from dvae.timegrid import Spacing, time_grid

if TYPE_CHECKING:
    from dvae.diffusion import Diffusion


class Variance(Enum):
    """The variance of the noise that one reverse step from t to s adds (Ho et al. 2020, section 3.2)."""

    fixedlarge = 1
    """1 - abar_t / abar_s, which is beta_t between neighbours: right for data ~ N(0, I)."""
    fixedsmall = 2
    """That of q(u_s | u_t, x0): right for data that are one point."""


@SAMPLERS.register("ddpm")
class DDPM(Sampler):
    """Ancestral sampling: u_s ~ q(u_s | u_t, x0(u_t)) (Ho et al. 2020, algorithm 2), over any subset of the times.

    The last step, to t = 0, adds no noise and returns x0. So the first entries of the tables "fixedlarge" =
    [posterior_variance[1], beta[1:]] and "fixedsmall" (clipped at index 0) are never met.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        steps: int = 1000
        """Network evaluations; at most the number of the schedule's discrete times, where it has them."""
        spacing: Spacing = Spacing.uniform
        """uniform | quadratic (finer near the data)."""
        variance: Variance = Variance.fixedlarge
        """fixedlarge | fixedsmall."""
        clip_x0: bool = True
        """Keep the predicted x0 within the image range at each step."""
        temperature: float = 1.0
        """Factor on the starting noise u_1; below 1 trades variety for regularity."""

    def __init__(self, config: Config, io: Shapes) -> None:
        if config.steps < 1:
            raise UserError(f"sampler.steps={config.steps}: must be at least 1")
        self.config = config

    def supports(self, diffusion: Diffusion) -> bool:
        return diffusion.k == 1

    @torch.no_grad()
    def sample(self, model: Model, u: torch.Tensor, noise: Noise, on_step: OnStep | None = None) -> Sampled:
        config, diffusion = self.config, model.diffusion
        times = time_grid(diffusion.schedule, config.steps, config.spacing)
        u, nfe = config.temperature * u, 0
        if on_step is not None:
            u = on_step(0, times[0], u)
        for i, (t, s) in enumerate(pairwise(times)):
            x0 = model(u, t, clip=config.clip_x0).x0
            nfe += 1
            c_x0, c_u, variance = (value.item() for value in diffusion.posterior(s, t))
            if config.variance is Variance.fixedlarge:
                variance = diffusion.transition(s, t)[1].item()
            u = c_x0 * x0 + c_u * u
            if s > 0.0:
                u = u + variance**0.5 * noise(i)
            if on_step is not None:
                u = on_step(i + 1, s, u)
        return Sampled(u, nfe)
