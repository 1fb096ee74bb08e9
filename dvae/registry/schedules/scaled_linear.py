"""The table of latent diffusion."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.registry.schedules.base import SCHEDULES
from dvae.registry.schedules.ddpm_linear import DDPMLinear


@SCHEDULES.register("scaled_linear")
class ScaledLinear(DDPMLinear):
    """A table like DDPM's whose beta_i have evenly spaced roots (Rombach et al. 2022, in their code).

    It adds noise more slowly at first. The defaults are those of their faces; Stable Diffusion's are 0.00085 and 0.012.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(DDPMLinear.Config):
        beta_start: float = 0.0015
        """beta of the first step, in (0, 1)."""
        beta_end: float = 0.0195
        """beta of the last step, in (0, 1)."""

    def _spread(self, config: DDPMLinear.Config) -> torch.Tensor:
        ends = config.beta_start**0.5, config.beta_end**0.5
        return torch.linspace(*ends, config.steps, dtype=torch.float64, device="cpu").square()
