"""Symmetric splitting."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.diffusion.kernels import Diffusion
from dvae.diffusion.linalg import apply_matrix, matrix_sqrt
from dvae.registry.samplers.base import SAMPLERS, Sampler, SamplerState


@SAMPLERS.register("sscs")
class SSCS(Sampler):
    """Symmetric splitting of the reverse SDE, for any process (Dockhorn et al. 2022, section 4 and appendix D).

    Its drift, along falling B, is that of the stationary process run backwards, which is solved exactly, plus
    2 D (score + S_inf^-1 u), which vanishes for data that are N(0, S_inf). A step is half of the first, a full Euler
    step of the second with the score at t (where the step starts, as published), half of the first. The halves meet at
    the middle in t; each has its own time on the clock. Two noises per step, numbers 2 i and 2 i + 1.
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
    """A draw of u_s given u_t under the backward process that keeps N(0, S_inf)."""
    Phi, S = diffusion.stationary_reverse_kernel(s, t)
    return apply_matrix(Phi, u) + apply_matrix(matrix_sqrt(S), noise)
