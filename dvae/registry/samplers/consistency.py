"""Multistep consistency sampling."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.diffusion.kernels import Diffusion
from dvae.diffusion.time_grid import Spacing
from dvae.registry.samplers.base import SAMPLERS, Sampler, SamplerState


@SAMPLERS.register("consistency")
class ConsistencySampler(Sampler):
    """Predict the image, add new noise for the next lower time, and repeat (Song et al. 2023, algorithm 1).

    It takes 1 to 4 steps. It needs a refiner that was tuned with distiller=consistency, so that it predicts one image
    instead of a mean.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Sampler.Config):
        steps: int = 2
        """Number of steps, including the last one to t = 0."""
        spacing: Spacing = Spacing.quadratic
        """Spacing of the times: uniform | quadratic | log_snr | karras. quadratic was better than uniform in the
        measurements of docs/extensions.md."""

    needs_mean_denoiser = False

    def supports(self, diffusion: Diffusion) -> bool:
        return diffusion.k == 1

    def step(self, state: SamplerState, u: torch.Tensor, t: float, s: float) -> torch.Tensor:
        return state.diffusion.perturb(state.predict(u, t).x0, s, state.noise(state.i))
