"""Encoders: stage-1 models, an image x to a latent z and back to a blurry reconstruction x_hat."""

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
    """q(z | x) = N(mean, exp(logvar)), both (B, *latent)."""

    mean: torch.Tensor
    logvar: torch.Tensor

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """z = mean + std * noise, with noise ~ N(0, I) of shape (B, *latent)."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self) -> torch.Tensor:
        """KL(q(z | x) || N(0, I)) per sample, (B,), in nats (Kingma & Welling 2014, appendix B)."""
        terms = 0.5 * (self.mean**2 + torch.exp(self.logvar) - 1.0 - self.logvar)
        return terms.flatten(1).sum(1)


def squared_error(x: torch.Tensor, x_hat: torch.Tensor) -> torch.Tensor:
    """Sum of (x - x_hat)^2 over pixels in [0, 1] units, (B,), for images (B, C, H, W) in [-1, 1]."""
    return (0.5 * (x.float() - x_hat)).square().flatten(1).sum(1)


def vae_terms(reconstruction: torch.Tensor, kl: torch.Tensor, kl_weight: float) -> dict[str, torch.Tensor]:
    """The terms of a VAE's objective, each (B,): "loss" = reconstruction + kl_weight * kl, and both of them."""
    return {"loss": reconstruction + kl_weight * kl, "reconstruction": reconstruction, "kl": kl}


@dataclass(frozen=True)
class Adversary:
    """What an encoder is trained against besides its own objective: a discriminator of real images and x_hat."""

    discriminator: nn.Module
    """Images (B, C, H, W) to logits (B, 1, h, w), high where they are taken for real. Trained, and then thrown away."""
    loss: GanLoss
    weight: float
    """Weight of the adversarial loss, times the adaptive weight (dvae.layers.adversarial)."""
    start: int
    """Steps before the discriminator is trained."""
    warmup: int
    """Steps in which the discriminator is trained and the encoder is not yet trained against it."""
    lr: float
    """Learning rate of the discriminator, as a multiple of the encoder's."""
    last_layer: nn.Conv2d
    """The decoder's last layer, at which gradients are compared."""
    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """distance(x, x_hat), (B,): the reconstruction error that the adversarial loss is balanced with."""


class Encoder(nn.Module, ABC):
    """An autoencoder. Images are (B, C, H, W) in [-1, 1]; latents are (B, *latent_shape)."""

    Config: type[ComponentConfig]
    latent_shape: tuple[int, ...]
    """(D,) for a vector, (C, h, w) for a map."""

    @abstractmethod
    def __init__(self, config: ComponentConfig, shapes: Shapes) -> None:
        super().__init__()

    @abstractmethod
    def encode(self, x: torch.Tensor) -> Posterior: ...

    @abstractmethod
    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """x_hat (B, C, H, W) in [-1, 1]."""

    @abstractmethod
    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """The training objective for one batch; noise ~ N(0, I) is (B, *latent).

        Returns per-sample terms, each (B,) in fp32: "loss", which is minimized, and whatever else is worth a curve.
        Beside them what was drawn, "z" (B, *latent) and "x_hat" (B, C, H, W), and where there is an adversary
        "features", the input of the decoder's last layer.
        """

    def adversary(self) -> Adversary | None:
        """A new discriminator and how to train against it; None where the objective is all."""
        return None

    def pretrained(self) -> dict[str, torch.Tensor] | None:
        """A state dict that the encoder stage takes over instead of training; None where it trains.

        Raises UserError where it cannot be read or does not fit.
        """
        return None


ENCODERS: Registry[Encoder] = Registry("encoder", __package__, Encoder)
