"""Heun's method, the sampler of EDM."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.diffusion.kernels import Diffusion
from dvae.diffusion.time_grid import Spacing
from dvae.registry.samplers.base import SAMPLERS, Sampler, SamplerState


@SAMPLERS.register("heun")
class Heun(Sampler):
    """Heun's trapezoidal rule in r = sigma/alpha (Karras et al. 2022, algorithm 1).

    With w = u/alpha the flow is dw = eps dr. The method has order 2, and leaves out the paper's churn. It makes two
    model calls per step and one in the last, so 2 * steps - 1 in total. Choose a spacing in which r decreases by a
    modest factor per step, such as karras and log_snr. If B(1) is infinite, r is infinite too, and the first step is
    the same as in DDIM.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Sampler.Config):
        spacing: Spacing = Spacing.karras
        """Spacing of the times: karras | log_snr. Use uniform or quadratic only on a schedule on which r changes slowly
        near t = 1, such as edm."""

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
