"""The convolutional VAE of DiffuseVAE: residual bottleneck blocks without normalization, and a vector latent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.encoders.base import ENCODERS, Encoder, Posterior, vae_terms


@ENCODERS.register("conv_vae")
class ConvVAE(Encoder):
    """VAE with residual bottleneck blocks and a vector latent (Pandey et al. 2022, appendix; after VDVAE).

    The block strings of the published configurations translate as follows, at resolution R:

    - "RxN,Rd2" in the encoder is N + 1 in `encoder_blocks`. Average pooling follows the last block of a resolution.
    - "RxN" in the decoder is N in `decoder_blocks`.

    The parameters have the same names as in the authors' code: enc.in_conv, enc.block_mod.N.c1..c4, enc.mu,
    enc.logvar, dec.block_mod.N, dec.last_conv.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        resolutions: list[int] = field(default_factory=lambda: [32, 16, 8, 4, 1])
        """Heights of the feature maps in pixels, from image_size / patch down to 1. Each must divide the one before."""
        channels: list[int] = field(default_factory=lambda: [64, 128, 256, 256, 512])
        """Number of channels at each resolution; must be even."""
        encoder_blocks: list[int] = field(default_factory=lambda: [8, 5, 5, 4, 3])
        """Number of residual blocks of the encoder at each resolution, in the order of `resolutions`."""
        decoder_blocks: list[int] = field(default_factory=lambda: [15, 7, 3, 2, 1])
        """Number of residual blocks of the decoder at each resolution, in the order of `resolutions`."""
        latent_dim: int = 512
        """Length D of the latent z."""
        kl_weight: float = 1.0
        """Weight of KL(q(z|x) || p(z)); 0 or more. The squared error, summed over pixels in [0, 1], has weight 1."""
        patch: int = 1
        """Side, in pixels, of the patches that are folded into channels. The network works at image_size / patch."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        _check(config, shapes)
        self.config = config
        self.latent_shape = (config.latent_dim,)
        folded = shapes.channels * config.patch**2
        self.enc = ConvEncoder(config, folded)
        self.dec = ConvDecoder(config, folded)

    def encode(self, x: torch.Tensor) -> Posterior:
        """Return q(z | x), with mean and logvar (B, D) in fp32, of images x (B, C, H, W) in [-1, 1]."""
        mean, logvar = self.enc(F.pixel_unshuffle(0.5 * (x + 1.0), self.config.patch))
        return Posterior(mean.flatten(1).float(), logvar.flatten(1).float())

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """Return x_hat (B, C, H, W), in [-1, 1], fp32, of latents z (B, D)."""
        return 2.0 * self._decode_unit(z) - 1.0

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute the objective, see `Encoder.forward`.

        The terms are "loss", "reconstruction" (sum of (x - x_hat)^2 in [0, 1] units) and "kl" (nats), each (B,).
        """
        posterior = self.encode(x)
        z = posterior.sample(noise)
        x_hat = self._decode_unit(z)
        reconstruction = (0.5 * (x.float() + 1.0) - x_hat).square().flatten(1).sum(1)
        terms = vae_terms(reconstruction, posterior.kl(), self.config.kl_weight)
        return terms | {"z": z, "x_hat": 2.0 * x_hat - 1.0}

    def _decode_unit(self, z: torch.Tensor) -> torch.Tensor:
        """Return x_hat (B, C, H, W), in [0, 1], fp32, of latents z (B, D)."""
        logits = F.pixel_shuffle(self.dec(z[:, :, None, None]), self.config.patch)
        return torch.sigmoid(logits.float())


class BottleneckBlock(nn.Module):
    """Residual bottleneck block: maps (B, C, H, W) to (B, C, H/pool, W/pool)."""

    def __init__(self, channels: int, resolution: int, pool: int = 1) -> None:
        super().__init__()
        middle = channels // 2
        kernel = 3 if resolution > 2 else 1
        self.pool = pool
        self.c1 = nn.Conv2d(channels, middle, 1)
        self.c2 = nn.Conv2d(middle, middle, kernel, padding=kernel // 2)
        self.c3 = nn.Conv2d(middle, middle, kernel, padding=kernel // 2)
        self.c4 = nn.Conv2d(middle, channels, 1)
        for convolution in (self.c1, self.c2, self.c3, self.c4):
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x
        for convolution in (self.c1, self.c2, self.c3, self.c4):
            h = convolution(F.gelu(h))
        return F.avg_pool2d(x + h, self.pool) if self.pool > 1 else x + h


class NearestUpsample(nn.Module):
    """Nearest-neighbor upsampling: maps (B, C, H, W) to (B, C, factor * H, factor * W), in channels_last."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = float(factor)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # the decoder starts at 1x1 pixels, where channels_last has no meaning and gets lost; it is set again here
        return F.interpolate(x, scale_factor=self.factor).contiguous(memory_format=torch.channels_last)


class ConvEncoder(nn.Module):
    """Encoder half: maps folded images (B, folded, R, R) to mean and logvar, each (B, D, 1, 1)."""

    def __init__(self, config: ConvVAE.Config, folded: int) -> None:
        super().__init__()
        self.in_conv = nn.Conv2d(folded, config.channels[0], 3, padding=1, bias=False)
        self.block_mod = nn.Sequential(*self._blocks(config))
        self.mu = nn.Conv2d(config.channels[-1], config.latent_dim, 1, bias=False)
        self.logvar = nn.Conv2d(config.channels[-1], config.latent_dim, 1, bias=False)

    @staticmethod
    def _blocks(config: ConvVAE.Config) -> Iterator[nn.Module]:
        sides, channels = config.resolutions, config.channels
        for level, (side, width, count) in enumerate(zip(sides, channels, config.encoder_blocks, strict=True)):
            last = level == len(sides) - 1
            for block in range(count):
                pooled = block == count - 1 and not last
                yield BottleneckBlock(width, side, side // sides[level + 1] if pooled else 1)
            if not last:
                yield nn.Conv2d(width, channels[level + 1], 1, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.block_mod(self.in_conv(x))
        return self.mu(h), self.logvar(h)


class ConvDecoder(nn.Module):
    """Decoder half: maps latents (B, D, 1, 1) to logits of folded images (B, folded, R, R)."""

    def __init__(self, config: ConvVAE.Config, folded: int) -> None:
        super().__init__()
        width = config.channels[-1]
        # in the published models D equals the width, and this layer does not exist
        self.in_conv = nn.Identity() if config.latent_dim == width else nn.Conv2d(config.latent_dim, width, 1)
        self.block_mod = nn.Sequential(*self._blocks(config))
        self.last_conv = nn.Conv2d(config.channels[0], folded, 3, padding=1)

    @staticmethod
    def _blocks(config: ConvVAE.Config) -> Iterator[nn.Module]:
        sides, channels = config.resolutions, config.channels
        for level in reversed(range(len(sides))):
            for _ in range(config.decoder_blocks[level]):
                yield BottleneckBlock(channels[level], sides[level])
            if level > 0:
                yield NearestUpsample(sides[level - 1] // sides[level])
                yield nn.Conv2d(channels[level], channels[level - 1], 1, bias=False)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.last_conv(self.block_mod(self.in_conv(z)))


def _check(config: ConvVAE.Config, shapes: Shapes) -> None:
    """Raise UserError if the fields do not fit each other or the images."""
    sides = config.resolutions
    for name in ("channels", "encoder_blocks", "decoder_blocks"):
        values = getattr(config, name)
        if len(values) != len(sides):
            raise UserError(
                f"encoder.{name} {values} has {len(values)} entries: give {len(sides)}, one for each of "
                f"encoder.resolutions {sides}"
            )
    if config.patch < 1 or shapes.image_size % config.patch:
        raise UserError(f"encoder.patch {config.patch} does not divide images of {shapes.image_size} px")
    top = shapes.image_size // config.patch
    if not sides or sides[0] != top or sides[-1] != 1:
        raise UserError(
            f"encoder.resolutions {sides} do not fit images of {shapes.image_size} px with encoder.patch "
            f"{config.patch}: start at {top} and end at 1"
        )
    if any(fine <= coarse or fine % coarse for fine, coarse in pairwise(sides)):
        raise UserError(f"encoder.resolutions {sides}: each must be a multiple of the next, and larger")
    if any(width < 2 or width % 2 for width in config.channels) or config.latent_dim < 1:
        raise UserError(
            f"encoder.channels {config.channels}, encoder.latent_dim {config.latent_dim}: give even channels and a "
            "positive latent_dim"
        )
    if min(config.encoder_blocks[:-1], default=1) < 1 or min(config.encoder_blocks + config.decoder_blocks) < 0:
        raise UserError(
            f"encoder.encoder_blocks {config.encoder_blocks}, encoder.decoder_blocks {config.decoder_blocks}: none may "
            "be negative, and the encoder needs at least one block at each resolution but the last"
        )
    if config.kl_weight < 0:
        raise UserError(f"encoder.kl_weight {config.kl_weight} is negative: use 0 or more")
