"""SSCS, the symmetric splitting sampler of critically damped Langevin diffusion."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.diffusion.kernels import Diffusion
from dvae.diffusion.linalg import apply_matrix, matrix_sqrt
from dvae.registry.samplers.base import SAMPLERS, Sampler, SamplerState


@SAMPLERS.register("sscs")
class SSCS(Sampler):
    """Symmetric splitting of the reverse SDE, for any process (Dockhorn et al. 2022, section 4 and appendix D).

    Along falling B, the SDE is split into two parts:

    - the stationary process run backwards, which is solved exactly,
    - the drift 2 D (score + S_inf^-1 u), which vanishes for data that are N(0, S_inf).

    A step consists of half of the first part, a full Euler step of the second, and the other half of the first. The
    Euler step uses the score at t, the start of the step, as published. The two halves meet at the middle in t, so they
    can differ in length on the clock B. Step i uses the noises 2 i and 2 i + 1.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Sampler.Config):
        pass

    def supports(self, diffusion: Diffusion) -> bool:
        return not diffusion.schedule.zero_terminal_snr

    def step(self, state: SamplerState, u: torch.Tensor, t: float, s: float) -> torch.Tensor:
        diffusion, middle = state.diffusion, 0.5 * (t + s)
        u = _relax(diffusion, u, t, middle, state.noise(2 * state.i))
        push = 2.0 * diffusion.D * diffusion.elapsed(s, t)[:, None, None]
        u = (
            u
            + apply_matrix(push, state.predict(u, t).score)
            + apply_matrix(push @ torch.linalg.inv(diffusion.S_inf), u)
        )
        return _relax(diffusion, u, middle, s, state.noise(2 * state.i + 1))


def _relax(diffusion: Diffusion, u: torch.Tensor, t: float, s: float, noise: torch.Tensor) -> torch.Tensor:
    """Draw u_s given u_t under the backward process that keeps N(0, S_inf). All are (B, k*C, H, W)."""
    Phi, S = diffusion.stationary_reverse_kernel(s, t)
    return apply_matrix(Phi, u) + apply_matrix(matrix_sqrt(S), noise)
