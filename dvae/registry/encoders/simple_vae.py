"""The simplest VAE: strided convolutions, linear heads, and transposed convolutions."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.encoders.base import ENCODERS, Encoder, Posterior, squared_error, vae_terms


@ENCODERS.register("simple_vae")
class SimpleVAE(Encoder):
    """VAE of 4x4 convolutions of stride 2 with a vector latent (Kingma & Welling 2014)."""

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        channels: list[int] = field(default_factory=lambda: [32, 64, 128, 256])
        """Channels after each convolution of the encoder. Each convolution halves height and width."""
        latent_dim: int = 128
        """Length D of the latent z."""
        kl_weight: float = 1.0
        """Weight of KL(q(z|x) || p(z)); 0 or more. The squared error, summed over pixels in [0, 1], has weight 1."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        _check(config, shapes)
        self.config = config
        self.latent_shape = (config.latent_dim,)
        widths = [shapes.channels, *config.channels]
        side = shapes.image_size // 2 ** len(config.channels)
        flat = widths[-1] * side**2
        down, up = nn.Sequential(), nn.Sequential()
        for inputs, outputs in pairwise(widths):
            down.extend([nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.SiLU()])
        for inputs, outputs in pairwise(reversed(widths)):
            up.extend([nn.SiLU(), nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)])
        self.down = down.append(nn.Flatten())
        self.mean, self.logvar = nn.Linear(flat, config.latent_dim), nn.Linear(flat, config.latent_dim)
        self.up = nn.Sequential(nn.Linear(config.latent_dim, flat), nn.Unflatten(1, (widths[-1], side, side)), *up)

    def encode(self, x: torch.Tensor) -> Posterior:
        """Return q(z | x), with mean and logvar (B, D) in fp32, of images x (B, C, H, W) in [-1, 1]."""
        h = self.down(x)
        return Posterior(self.mean(h).float(), self.logvar(h).float())

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Return x_hat (B, C, H, W), in [-1, 1], fp32, of latents z (B, D)."""
        return torch.tanh(self.up(z).float())

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the objective, see `Encoder.forward`.

        The terms are "loss", "reconstruction" (sum of (x - x_hat)^2 in [0, 1] units) and "kl" (nats), each (B,).
        """
        posterior = self.encode(x)
        z = posterior.sample(noise)
        x_hat = self.decode(z)
        terms = vae_terms(squared_error(x, x_hat), posterior.kl(), self.config.kl_weight)
        return terms | {"z": z, "x_hat": x_hat}


def _check(config: SimpleVAE.Config, shapes: Shapes) -> None:
    """Raise UserError if the fields are out of range or do not fit the images."""
    if not config.channels or min(config.channels) < 1 or config.latent_dim < 1 or config.kl_weight < 0:
        raise UserError(
            f"encoder.channels {config.channels}, encoder.latent_dim {config.latent_dim}, encoder.kl_weight "
            f"{config.kl_weight}: give at least one width, positive sizes, and a weight of 0 or more"
        )
    if shapes.image_size % 2 ** len(config.channels):
        raise UserError(
            f"images of {shapes.image_size} px do not halve {len(config.channels)} times: give fewer encoder.channels"
        )
