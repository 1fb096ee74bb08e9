"""The discrete schedule of latent diffusion."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.registry.schedules.base import SCHEDULES
from dvae.registry.schedules.ddpm_linear import DDPMLinear


@SCHEDULES.register("scaled_linear")
class ScaledLinear(DDPMLinear):
    """A table like DDPM's, but with evenly spaced square roots of beta_i (code of Rombach et al. 2022).

    It adds noise more slowly at first. The defaults are the paper's values for faces. Stable Diffusion uses 0.00085 and
    0.012.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(DDPMLinear.Config):
        beta_start: float = 0.0015
        """beta of the first step, in (0, 1)."""
        beta_end: float = 0.0195
        """beta of the last step, in (0, 1) and at least beta_start."""

    def _spread(self, config: DDPMLinear.Config) -> torch.Tensor:
        ends = config.beta_start**0.5, config.beta_end**0.5
        return torch.linspace(*ends, config.steps, dtype=torch.float64, device="cpu").square()
