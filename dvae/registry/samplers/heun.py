"""Heun's method of EDM."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.diffusion.kernels import Diffusion
from dvae.diffusion.time_grid import Spacing
from dvae.registry.samplers.base import SAMPLERS, Sampler, SamplerState


@SAMPLERS.register("heun")
class Heun(Sampler):
    """Heun's trapezoid in r = sigma/alpha: with w = u/alpha the flow is dw = eps dr (Karras et al. 2022, algorithm 1).

    Order 2, without their churn; two evaluations a step, 2 steps - 1 in all. Over one step r should fall by a modest
    factor, as with spacing karras and log_snr. Where B(1) is infinite, so is r, and the first step is DDIM's.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Sampler.Config):
        spacing: Spacing = Spacing.karras
        """karras | log_snr; uniform and quadratic only on a schedule that is fine in r near t = 1, such as edm."""

    def supports(self, diffusion: Diffusion) -> bool:
        return diffusion.k == 1

    def step(self, state: SamplerState, u: torch.Tensor, t: float, s: float) -> torch.Tensor:
        diffusion, prediction = state.diffusion, state.predict(u, t)
        alpha_s, sigma_s, alpha_t = diffusion.alpha(s).item(), diffusion.sigma(s).item(), diffusion.alpha(t).item()
        euler = alpha_s * prediction.x0 + sigma_s * prediction.eps  # = alpha_s (w + (r_s - r_t) eps)
        if alpha_t == 0.0:
            return euler
        change = sigma_s - alpha_s * (diffusion.sigma(t).item() / alpha_t)  # alpha_s (r_s - r_t)
        return euler + 0.5 * change * (state.predict(euler, s).eps - prediction.eps)
