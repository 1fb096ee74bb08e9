"""Multistep consistency sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.diffusion.kernels import Diffusion
from dvae.diffusion.time_grid import Spacing
from dvae.registry.samplers.base import SAMPLERS, Sampler, SamplerState


@SAMPLERS.register("consistency")
class ConsistencySampler(Sampler):
    """The predicted image, noised anew to each lower time (Song et al. 2023, algorithm 1): for refiners that were tuned
    to see the image itself (distiller=consistency), in 1 to 4 steps."""

    @dataclass(kw_only=True, slots=True)
    class Config(Sampler.Config):
        steps: int = 2
        """Steps of the grid, the last to t = 0 included."""
        spacing: Spacing = Spacing.quadratic
        """As of other samplers; quadratic was better than uniform where it was measured (docs/extensions.md)."""

    needs_mean_denoiser = False

    def supports(self, diffusion: Diffusion) -> bool:
        return diffusion.k == 1

    def step(self, state: SamplerState, u: torch.Tensor, t: float, s: float) -> torch.Tensor:
        return state.diffusion.perturb(state.predict(u, t).x0, s, state.noise(state.i))
