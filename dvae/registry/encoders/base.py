"""Encoders: the models of stage 1.

An encoder maps an image x to a latent z, and z back to a blurry reconstruction x_hat.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from dvae.layers.adversarial import GanLoss
from dvae.registry.core import ComponentConfig, Registry, Shapes


@dataclass(frozen=True)
class Posterior:
    """Diagonal Gaussian posterior q(z | x) = N(mean, exp(logvar)). mean and logvar have shape (B, *latent)."""

    mean: torch.Tensor
    logvar: torch.Tensor

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """Return z = mean + std * noise (B, *latent), for noise ~ N(0, I) of the same shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> torch.Tensor:
        """Return KL(q(z | x) || N(0, I)) per sample (B,), in nats (Kingma & Welling 2014, appendix B)."""
        terms = 0.5 * (self.mean**2 + torch.exp(self.logvar) - 1.0 - self.logvar)
        return terms.flatten(1).sum(1)


def squared_error(x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
    """Return the sum of (x - x_hat)^2 over pixels and channels, per sample (B,).

    x and x_hat (B, C, H, W) are in [-1, 1]. The error is computed in units of [0, 1], hence the factor 0.5.
    """
    return (0.5 * (x.float() - x_hat)).square().flatten(1).sum(1)


def vae_terms(reconstruction: torch.Tensor, kl: torch.Tensor, kl_weight: float) -> dict[str, torch.Tensor]:
    """Return the terms of a VAE's objective, each (B,): "loss" = reconstruction + kl_weight * kl, and both terms."""
    return {"loss": reconstruction + kl_weight * kl, "reconstruction": reconstruction, "kl": kl}


@dataclass(frozen=True)
class Adversary:
    """Adversarial part of an encoder's training: a discriminator between real images and x_hat, and its settings."""

    discriminator: nn.Module
    """Network from images (B, C, H, W) to logits (B, 1, h, w). High logits mean "real".

    It is trained with the encoder and discarded afterwards.
    """
    loss: GanLoss
    """Losses of the discriminator and of the encoder."""
    weight: float
    """Weight of the adversarial loss. It is multiplied by the adaptive weight (dvae.layers.adversarial)."""
    start: int
    """Number of steps before the training of the discriminator starts."""
    warmup: int
    """Number of steps in which only the discriminator is trained, without effect on the encoder."""
    lr: float
    """Learning rate of the discriminator, as a multiple of the encoder's."""
    last_layer: nn.Conv2d
    """Last layer of the decoder. The adaptive weight compares gradients at this layer."""
    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """distance(x, x_hat) (B,): reconstruction error against which the adversarial loss is balanced."""


class Encoder(nn.Module, ABC):
    """Base class of encoders. An encoder is an autoencoder with a Gaussian posterior.

    Images have shape (B, C, H, W) and range [-1, 1]. Latents have shape (B, *latent_shape). `encode` returns the
    posterior of images, `decode` the reconstruction from latents, and `forward` the training objective.
    """

    Config: type[ComponentConfig]
    latent_shape: tuple[int, ...]
    """Shape of one latent: (D,) for a vector, (C, h, w) for a map."""

    @abstractmethod
    def __init__(self, config: ComponentConfig, shapes: Shapes) -> None:
        super().__init__()

    @abstractmethod
    def encode(self, x: torch.Tensor) -> Posterior: ...

    @abstractmethod
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction x_hat (B, C, H, W), in [-1, 1], of latents z (B, *latent)."""

    @abstractmethod
    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the training objective of one batch.

        Args:
            x: Images (B, C, H, W) in [-1, 1].
            noise: Random numbers (B, *latent) ~ N(0, I), for the sample of the posterior.

        Returns:
            Terms per sample, each (B,) in fp32: "loss", which is minimized, and further terms, which are logged.
            The dict also holds the sample "z" (B, *latent) and its reconstruction "x_hat" (B, C, H, W). If there is an
            adversary, it also holds "features", the input of the decoder's last layer.
        """

    def adversary(self) -> Adversary | None:
        """Return a new discriminator and the settings of the adversarial training, or None if there is none."""
        return None

    def pretrained(self) -> dict[str, torch.Tensor] | None:
        """Return a state dict that the encoder stage uses instead of training, or None if the stage trains.

        Raises UserError if the weights cannot be read or do not fit the encoder.
        """
        return None


ENCODERS: Registry[Encoder] = Registry("encoder", __package__, Encoder)
