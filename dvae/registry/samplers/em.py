"""The Euler-Maruyama method."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.diffusion.kernels import Diffusion
from dvae.diffusion.linalg import apply_matrix, matrix_sqrt
from dvae.registry.samplers.base import SAMPLERS, Sampler, SamplerState


@SAMPLERS.register("em")
class EulerMaruyama(Sampler):
    """Euler-Maruyama steps of the reverse SDE, for any process (Song et al. 2021, equation 6; Pandey & Mandt 2023).

    u_s = u_t + (-A u_t + 2 D score) dB + sqrt(2 D dB) noise, with the exact dB = B(t) - B(s) of the clock.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Sampler.Config):
        pass

    def supports(self, diffusion: Diffusion) -> bool:
        return not diffusion.schedule.zero_terminal_snr

    def step(self, state: SamplerState, u: torch.Tensor, t: float, s: float) -> torch.Tensor:
        diffusion = state.diffusion
        dB = diffusion.elapsed(s, t)[:, None, None]
        drift = apply_matrix(-diffusion.A * dB, u) + apply_matrix(2.0 * diffusion.D * dB, state.predict(u, t).score)
        return u + drift + apply_matrix(matrix_sqrt(2.0 * diffusion.D * dB), state.noise(state.i))
