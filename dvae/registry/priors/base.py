"""Priors: distributions p(z) of the latent. Generation of a new image starts with a sample of the prior."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import nn

from dvae.registry.core import ComponentConfig, Registry, Shapes


class Prior(nn.Module, ABC):
    """Base class of distributions over latents.

    Fitted values are buffers, so that the state dict of a bundle contains them.
    """

    Config: type[ComponentConfig]

    @abstractmethod
    def __init__(self, config: ComponentConfig, shapes: Shapes) -> None:
        super().__init__()

    def fit(self, mean: torch.Tensor, logvar: torch.Tensor, seed: int) -> dict[str, float]:
        """Fit the prior to the posteriors of the training images.

        Args:
            mean: Means of the posteriors (N, *latent), float32.
            logvar: Logarithms of their variances (N, *latent), float32.
            seed: Seed of all random draws of the fit.

        Returns:
            Metrics for the log, by name. The default does nothing and returns no metrics.
        """
        return {}

    @abstractmethod
    def sample(self, uniform: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
        """Return z (n, *latent), a pure function of the given random numbers.

        Args:
            uniform: Uniform random numbers (n,) in [0, 1).
            normal: Normal random numbers (n, *latent) ~ N(0, I).
        """

    @abstractmethod
    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Return log p(z) (n,) of latents (n, *latent), in nats, float64."""


def log_normal(e: torch.Tensor) -> torch.Tensor:
    """Return log N(e; 0, I) (n,) of the rows of e (n, D), in nats, float64."""
    return -0.5 * (e.double().square().sum(1) + e.shape[1] * math.log(2.0 * math.pi))


PRIORS: Registry[Prior] = Registry("prior", __package__, Prior)
