"""DDIM."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.samplers import SAMPLERS, Model, Noise, OnStep, Sampled, Sampler
from dvae.timegrid import Spacing, time_grid

if TYPE_CHECKING:
    from dvae.diffusion import Diffusion


@SAMPLERS.register("ddim")
class DDIM(Sampler):
    """DDIM: deterministic at eta = 0, DDPM's fixedsmall at eta = 1 (Song et al. 2021, equation 12)."""

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        steps: int = 50
        """Network evaluations; at most the number of the schedule's discrete times, where it has them."""
        spacing: Spacing = Spacing.uniform
        """uniform | quadratic (finer near the data)."""
        eta: float = 0.0
        """Noise per step, as a fraction in [0, 1] of the standard deviation of q(u_s | u_t, x0)."""
        clip_x0: bool = True
        """Keep the predicted x0 within the image range at each step."""
        temperature: float = 1.0
        """Factor on the starting noise u_1; below 1 trades variety for regularity."""

    def __init__(self, config: Config, io: Shapes) -> None:
        if config.steps < 1:
            raise UserError(f"sampler.steps={config.steps}: must be at least 1")
        if not 0.0 <= config.eta <= 1.0:
            raise UserError(f"sampler.eta={config.eta}: must be in [0, 1]; 0 is deterministic, 1 is DDPM")
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
            prediction = model(u, t, clip=config.clip_x0)
            nfe += 1
            added = config.eta**2 * diffusion.posterior(s, t)[2].item()
            kept = max(diffusion.sigma(s).item() ** 2 - added, 0.0)
            u = diffusion.alpha(s).item() * prediction.x0 + kept**0.5 * prediction.eps
            if added > 0.0:  # never in the last step
                u = u + added**0.5 * noise(i)
            if on_step is not None:
                u = on_step(i + 1, s, u)
        return Sampled(u, nfe)
