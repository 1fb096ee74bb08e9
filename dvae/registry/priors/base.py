"""Priors: p(z), from which new images start."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import nn

from dvae.registry.core import ComponentConfig, Registry, Shapes


class Prior(nn.Module, ABC):
    """A distribution over latents. What is fitted lives in buffers, so that a bundle's state dict holds it."""

    Config: type[ComponentConfig]

    @abstractmethod
    def __init__(self, config: ComponentConfig, shapes: Shapes) -> None:
        super().__init__()

    def fit(self, mean: torch.Tensor, logvar: torch.Tensor, seed: int) -> dict[str, float]:
        """Fit to the posteriors of the training images, both (N, *latent), float32. Returns figures worth logging."""
        return {}

    @abstractmethod
    def sample(self, uniform: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
        """z (n, *latent) as a pure function of uniform (n,) in [0, 1) and normal (n, *latent) ~ N(0, I)."""

    @abstractmethod
    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """log p(z) of latents (n, *latent), in nats, (n,), float64."""


def log_normal(e: torch.Tensor) -> torch.Tensor:
    """log N(e; 0, I) of rows (n, D), in nats, (n,), float64."""
    return -0.5 * (e.double().square().sum(1) + e.shape[1] * math.log(2.0 * math.pi))


PRIORS: Registry[Prior] = Registry("prior", __package__, Prior)
