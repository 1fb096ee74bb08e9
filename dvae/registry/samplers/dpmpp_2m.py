"""DPM-Solver++(2M) and its SDE form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from dvae.diffusion.kernels import Diffusion
from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.samplers.base import SAMPLERS, Sampler, SamplerState


@SAMPLERS.register("dpmpp_2m")
class DPMSolverPP2M(Sampler):
    """Two-step method in lambda = log(alpha/sigma) and x0, or its SDE form (Lu et al. 2022, DPM-Solver++, algorithm 2).

    Between t and s, x0 is replaced by its value in the middle, which is extrapolated from the last two predictions. The
    rest of the step and its noise are exact. The method has order 2, with one model call per step. The first step is
    the same as in DDIM.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Sampler.Config):
        eta: float = 0.0
        """Amount of noise, in [0, 1]. 0 is the probability flow, and 1 is the reverse SDE. For small steps it equals
        the square of DDIM's eta."""

    config: Config

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        if not 0.0 <= config.eta <= 1.0:
            raise UserError(f"sampler.eta={config.eta}: must be in [0, 1]; 0 is deterministic, 1 is the reverse SDE")

    def supports(self, diffusion: Diffusion) -> bool:
        return diffusion.k == 1

    def step(self, state: SamplerState, u: torch.Tensor, t: float, s: float) -> torch.Tensor:
        diffusion, x0 = state.diffusion, state.predict(u, t).x0
        now, then = diffusion.log_snr(t).item(), diffusion.log_snr(s).item()
        h, middle = then - now, x0  # h is infinite if alpha(t) = 0
        if state.history:
            before, x0_before = state.history[-1]
            middle = x0 + 0.5 * (h / (now - before)) * (x0 - x0_before)
        state.history = [(now, x0)]
        alpha, sigma, sigma_t = (value.item() for value in (diffusion.alpha(s), diffusion.sigma(s), diffusion.sigma(t)))
        # the part of the step that replaces old noise by new noise; the branch is there because 0 times infinity is nan
        turned = self.config.eta * h if self.config.eta > 0.0 else 0.0
        u = sigma / sigma_t * math.exp(-turned) * u - alpha * math.expm1(-h - turned) * middle
        return u + sigma * math.sqrt(-math.expm1(-2.0 * turned)) * state.noise(state.i) if turned > 0.0 else u
