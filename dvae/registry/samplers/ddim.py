"""DDIM, the denoising diffusion implicit model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.diffusion.kernels import Diffusion
from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.samplers.base import SAMPLERS, Sampler, SamplerState


@SAMPLERS.register("ddim")
class DDIM(Sampler):
    """DDIM: deterministic at eta = 0, DDPM's fixedsmall at eta = 1 (Song et al. 2021, equation 12)."""

    @dataclass(kw_only=True, slots=True)
    class Config(Sampler.Config):
        eta: float = 0.0
        """Standard deviation of the noise of each step, as a fraction in [0, 1] of the standard deviation of
        q(u_s | u_t, x0)."""

    config: Config

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        if not 0.0 <= config.eta <= 1.0:
            raise UserError(f"sampler.eta={config.eta}: must be in [0, 1]; 0 is deterministic, 1 is DDPM")

    def supports(self, diffusion: Diffusion) -> bool:
        return diffusion.k == 1

    def step(self, state: SamplerState, u: torch.Tensor, t: float, s: float) -> torch.Tensor:
        diffusion, prediction = state.diffusion, state.predict(u, t)
        added = self.config.eta**2 * diffusion.posterior(s, t)[2].item()
        kept = max(diffusion.sigma(s).item() ** 2 - added, 0.0)  # rounding can make the difference negative
        u = diffusion.alpha(s).item() * prediction.x0 + kept**0.5 * prediction.eps
        return u + added**0.5 * state.noise(state.i) if added > 0.0 else u
