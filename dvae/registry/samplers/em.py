"""Euler-Maruyama."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dvae.diffusion.kernels import apply, square_root
from dvae.registry.samplers.base import SAMPLERS, Sampler, SamplerState

if TYPE_CHECKING:
    from dvae.diffusion.kernels import Diffusion


@SAMPLERS.register("em")
class EulerMaruyama(Sampler):
    """Euler-Maruyama of the reverse SDE, for any process (Song et al. 2021, equation 6; Pandey & Mandt 2023).

    u_s = u_t + (-A u_t + 2 D score) dB + sqrt(2 D dB) noise, with dB = B(t) - B(s) exact on every clock.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Sampler.Config):
        pass

    def supports(self, diffusion: Diffusion) -> bool:
        return not diffusion.schedule.endless

    def step(self, walk: SamplerState, u: torch.Tensor, t: float, s: float) -> torch.Tensor:
        diffusion = walk.diffusion
        dB = diffusion.elapsed(s, t)[:, None, None]
        drift = apply(-diffusion.A * dB, u) + apply(2.0 * diffusion.D * dB, walk.predict(u, t).score)
        return u + drift + apply(square_root(2.0 * diffusion.D * dB), walk.noise(walk.i))
