"""The standard normal prior."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.priors.base import PRIORS, Prior, log_normal


@PRIORS.register("normal")
class Normal(Prior):
    """Standard normal prior p(z) = N(0, I), which the VAE was trained with."""

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        pass

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)

    def sample(self, uniform: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
        """Return `normal` unchanged."""
        return normal

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        return log_normal(z.flatten(1))
