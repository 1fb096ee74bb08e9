"""Refiners: denoising networks. They know no schedule, process or prediction type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from dvae.registry.core import ComponentConfig, Registry, Shapes


@dataclass(frozen=True)
class Condition:
    """What a refiner is conditioned on. A dropped condition is all zeros."""

    image: torch.Tensor | None = None
    """x_hat (B, condition_channels, H, W), in [-1, 1]; concatenated to u."""
    latent: torch.Tensor | None = None
    """z (B, *latent); latent guidance."""
    label: torch.Tensor | None = None
    """Class (B,), int64; `labels` (one past the last class) where dropped."""


class Refiner(nn.Module, ABC):
    """A network from (u, t, condition) to an output of u's shape."""

    Config: type[ComponentConfig]

    @abstractmethod
    def __init__(self, config: ComponentConfig, io: Shapes) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: Condition) -> torch.Tensor:
        """u (B, k*C, H, W), t_feature (B,) in [0, 1000] -> (B, k*C, H, W)."""


REFINERS: Registry[Refiner] = Registry("refiner", __name__)
