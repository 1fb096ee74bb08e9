"""The VAE of DiffuseVAE: residual bottleneck blocks without normalisation, down to one vector."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.encoders import ENCODERS, Encoder, Posterior


@ENCODERS.register("conv_vae")
class ConvVAE(Encoder):
    """Residual convolutional VAE with a vector latent (Pandey et al. 2022, appendix; blocks as in Child 2021)."""

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        resolutions: list[int] = field(default_factory=lambda: [32, 16, 8, 4, 1])
        """Heights of the feature maps, finest first (image_size / patch), down to 1."""
        channels: list[int] = field(default_factory=lambda: [64, 128, 256, 256, 512])
        """Channels at each resolution."""
        encoder_blocks: list[int] = field(default_factory=lambda: [7, 4, 4, 3, 3])
        """Residual blocks of the encoder at each resolution, besides the one before each downsampling."""
        decoder_blocks: list[int] = field(default_factory=lambda: [15, 7, 3, 2, 1])
        """Residual blocks of the decoder at each resolution, in the order of `resolutions`."""
        latent_dim: int = 512
        """Width D of the latent z."""
        kl_weight: float = 1.0
        """Weight alpha of the KL term beside the squared error summed over pixels in [0, 1]."""
        patch: int = 1
        """Side, in pixels, of the patches folded into channels, so that the net works at image_size / patch."""

    def __init__(self, config: Config, io: Shapes) -> None:  # type: ignore[override]
        super().__init__(config, io)
        _check(config, io)
        self.config = config
        self.latent_shape = (config.latent_dim,)
        levels = list(zip(config.resolutions, config.channels, strict=True))
        pixels = io.channels * config.patch**2

        down: list[nn.Module] = [nn.PixelUnshuffle(config.patch), nn.Conv2d(pixels, config.channels[0], 3, padding=1)]
        for level, (side, width) in enumerate(levels):
            down += [Bottleneck(width, side) for _ in range(config.encoder_blocks[level])]
            if level + 1 < len(levels):
                next_side, next_width = levels[level + 1]
                down += [Bottleneck(width, side), nn.AvgPool2d(side // next_side), _transition(width, next_width)]
        self.enc = nn.Sequential(*down)
        self.mu = nn.Conv2d(config.channels[-1], config.latent_dim, 1, bias=False)
        self.logvar = nn.Conv2d(config.channels[-1], config.latent_dim, 1, bias=False)

        same = config.latent_dim == config.channels[-1]
        up: list[nn.Module] = [] if same else [_transition(config.latent_dim, config.channels[-1])]
        for level, (side, width) in reversed(list(enumerate(levels))):
            up += [Bottleneck(width, side) for _ in range(config.decoder_blocks[level])]
            if level > 0:
                next_side, next_width = levels[level - 1]
                up += [nn.Upsample(scale_factor=next_side // side), _transition(width, next_width)]
        up += [nn.Conv2d(config.channels[0], pixels, 3, padding=1), nn.PixelShuffle(config.patch)]
        self.dec = nn.Sequential(*up)

    def encode(self, x: torch.Tensor) -> Posterior:
        h = self.enc(0.5 * (x + 1.0))
        return Posterior(self.mu(h).float().flatten(1), self.logvar(h).float().flatten(1))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return 2.0 * self._unit_image(z) - 1.0

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Terms "loss", "reconstruction" (sum of squared errors over pixels in [0, 1]) and "kl", each (B,)."""
        posterior = self.encode(x)
        error = self._unit_image(posterior.sample(noise)) - 0.5 * (x.float() + 1.0)
        reconstruction, kl = error.square().flatten(1).sum(1), posterior.kl()
        return {"loss": reconstruction + self.config.kl_weight * kl, "reconstruction": reconstruction, "kl": kl}

    def _unit_image(self, z: torch.Tensor) -> torch.Tensor:
        """The decoder's image in [0, 1], fp32."""
        return torch.sigmoid(self.dec(z[:, :, None, None]).float())


class Bottleneck(nn.Module):
    """x + conv1(gelu(conv3(gelu(conv3(gelu(conv1(gelu(x)))))))) at half the width; 1x1 where the map is 1 or 2 high."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        middle, size = max(1, channels // 2), 3 if side > 2 else 1
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(channels, middle, 1),
                nn.Conv2d(middle, middle, size, padding=size // 2),
                nn.Conv2d(middle, middle, size, padding=size // 2),
                nn.Conv2d(middle, channels, 1),
            ]
        )
        for conv in self.convs:
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x
        for conv in self.convs:
            h = conv(F.gelu(h))
        return x + h


def _transition(inputs: int, outputs: int) -> nn.Module:
    """The change of width between two resolutions: a 1x1 convolution without bias."""
    return nn.Conv2d(inputs, outputs, 1, bias=False)


def _check(config: ConvVAE.Config, io: Shapes) -> None:
    """Raise UserError where the lists do not fit each other or the images."""
    sides = config.resolutions
    for name in ("channels", "encoder_blocks", "decoder_blocks"):
        values = getattr(config, name)
        if len(values) != len(sides):
            raise UserError(f"encoder.{name} has {len(values)} entries for {len(sides)} encoder.resolutions: give one each")
        if min(values, default=0) < (1 if name == "channels" else 0):
            raise UserError(f"encoder.{name}={values}: too small a number")
    if config.patch < 1 or not sides or sides[0] * config.patch != io.image_size or sides[-1] != 1:
        raise UserError(
            f"encoder.resolutions={sides} with encoder.patch={config.patch} do not lead from {io.image_size} px to 1: "
            f"start at {math.ceil(io.image_size / max(1, config.patch))} and end at 1"
        )
    if any(fine <= coarse or fine % coarse for fine, coarse in pairwise(sides)):
        raise UserError(f"encoder.resolutions={sides}: each must be a multiple of the next")
    if config.latent_dim < 1:
        raise UserError(f"encoder.latent_dim={config.latent_dim}: use 1 or more")
    if config.kl_weight < 0:
        raise UserError(f"encoder.kl_weight={config.kl_weight}: use 0 or more")
