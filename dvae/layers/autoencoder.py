"""The convolutional autoencoder of latent diffusion (Rombach et al. 2022, appendix G; after Esser et al. 2021).

The parameters have the same names as in diffusers' AutoencoderKL, so public weights load without conversion.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dvae.errors import UserError
from dvae.layers.attention import AttentionBackend, attention
from dvae.layers.norms import GroupNorm


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The architecture of the autoencoder."""

    colors: int
    """Number of color channels of the images."""
    channels: list[int]
    """Number of channels at each resolution. The first is the resolution of the images; each next one is half of it."""
    blocks: int
    """Number of residual blocks of the encoder at each resolution (at least 1). The decoder has one more."""
    latent_channels: int
    """Number of channels of the latent (at least 1)."""
    groups: int
    """Number of groups of GroupNorm. It must divide every entry of `channels`."""
    middle_attention: bool
    """Whether there is self-attention at the lowest resolution."""
    attention: AttentionBackend
    """The implementation of attention."""
    quant_conv: bool = True
    """Whether a 1x1 convolution follows the encoder."""
    post_quant_conv: bool = True
    """Whether a 1x1 convolution precedes the decoder."""

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Return the shape (C, h, w) of the latent of one image of `image_size` pixels per side.

        Raises UserError if the fields do not fit each other or the image size.
        """
        factor = 2 ** (len(self.channels) - 1)
        if not self.channels or self.blocks < 1 or self.latent_channels < 1:
            raise UserError(
                f"encoder: {len(self.channels)} resolutions of {self.blocks} blocks and {self.latent_channels} latent "
                "channels: each must be at least 1"
            )
        if self.groups < 1 or any(width < 1 or width % self.groups for width in self.channels):
            raise UserError(f"encoder: {self.groups} groups of GroupNorm do not divide the channels {self.channels}")
        if image_size % factor:
            raise UserError(
                f"images of {image_size} px do not halve {len(self.channels) - 1} times: give fewer resolutions in the "
                f"encoder's channels {self.channels}"
            )
        return self.latent_channels, image_size // factor, image_size // factor


class Autoencoder(nn.Module):
    """The encoder and the decoder. The four submodules have the same names as in the public checkpoints."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        moments, latent = 2 * config.latent_channels, config.latent_channels
        self.encoder = KLEncoder(config)
        self.decoder = KLDecoder(config)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.post_quant_conv else nn.Identity()

    def moments(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean and the log variance of q(z | x), both (B, latent_channels, h, w), fp32.

        `x` are images (B, C, H, W) in [-1, 1]. The log variance is clamped to [-30, 20].
        """
        mean, logvar = self.quant_conv(self.encoder(x)).float().chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)  # so that exp(logvar) does not overflow early in training

    def features(self, z: torch.Tensor) -> torch.Tensor:
        """Return the input (B, channels[0], H, W) of the last convolution for latents z (B, latent_channels, h, w)."""
        return self.decoder(self.post_quant_conv(z))

    @property
    def last_layer(self) -> nn.Conv2d:
        """The last convolution. It maps features to images, whose values may leave [-1, 1]."""
        return self.decoder.conv_out


class KLResBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU: (B, inputs, H, W) to (B, outputs, H, W)."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(inputs, silu=True, groups=groups, eps=1e-6)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = GroupNorm(outputs, silu=True, groups=groups, eps=1e-6)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv1(self.norm1(x))
        return self.conv_shortcut(x) + self.conv2(self.norm2(h))


class KLAttention(nn.Module):
    """Self-attention with one head over the pixels of a feature map, with a residual connection."""

    def __init__(self, channels: int, groups: int, backend: AttentionBackend) -> None:
        super().__init__()
        self.backend = backend
        self.group_norm = GroupNorm(channels, groups=groups, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pixels = self.group_norm(x).flatten(2).transpose(1, 2)
        q, k, v = (layer(pixels).unsqueeze(2) for layer in (self.to_q, self.to_k, self.to_v))
        h = self.to_out[0](attention(q, k, v, self.backend).squeeze(2))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class KLMiddle(nn.Module):
    """Two residual blocks at the lowest resolution, with optional attention between them."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        width = config.channels[-1]
        self.resnets = nn.ModuleList([KLResBlock(width, width, config.groups) for _ in range(2)])
        attentions = [KLAttention(width, config.groups, config.attention)] if config.middle_attention else []
        self.attentions = nn.ModuleList(attentions)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.resnets[0](x)
        for attend in self.attentions:
            x = attend(x)
        return self.resnets[1](x)


class KLDownsample(nn.Module):
    """A 3x3 convolution with stride 2. Only the right and the bottom are padded, as for the public weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class KLUpsample(nn.Module):
    """Nearest-neighbor upsampling, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0))


class KLLevel(nn.Module):
    """The residual blocks of one resolution, followed by a downsampling or an upsampling layer if there is one.

    `widths` are the pairs (inputs, outputs) of the channels of the residual blocks.
    """

    def __init__(
        self,
        widths: Iterable[tuple[int, int]],
        groups: int,
        down: KLDownsample | None = None,
        up: KLUpsample | None = None,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList([KLResBlock(inputs, outputs, groups) for inputs, outputs in widths])
        self.downsamplers = nn.ModuleList([] if down is None else [down])
        self.upsamplers = nn.ModuleList([] if up is None else [up])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.resnets, *self.downsamplers, *self.upsamplers):
            x = layer(x)
        return x


class KLEncoder(nn.Module):
    """The encoder: images (B, C, H, W) to moments (B, 2 * latent_channels, h, w)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.channels, config.groups
        self.conv_in = nn.Conv2d(config.colors, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(channels):
            widths = [(channels[max(0, level - 1)], width)] + [(width, width)] * (config.blocks - 1)
            step = KLDownsample(width) if level < len(channels) - 1 else None
            self.down_blocks.append(KLLevel(widths, groups, down=step))
        self.mid_block = KLMiddle(config)
        self.conv_norm_out = GroupNorm(channels[-1], silu=True, groups=groups, eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(x)
        for level in self.down_blocks:
            h = level(h)
        return self.conv_out(self.conv_norm_out(self.mid_block(h)))


class KLDecoder(nn.Module):
    """The decoder: latents (B, latent_channels, h, w) to the input (B, channels[0], H, W) of `conv_out`."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        channels, groups = config.channels[::-1], config.groups
        self.conv_in = nn.Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = KLMiddle(config)
        self.up_blocks = nn.ModuleList()
        for level, width in enumerate(channels):
            widths = [(channels[max(0, level - 1)], width)] + [(width, width)] * config.blocks
            step = KLUpsample(width) if level < len(channels) - 1 else None
            self.up_blocks.append(KLLevel(widths, groups, up=step))
        self.conv_norm_out = GroupNorm(channels[-1], silu=True, groups=groups, eps=1e-6)
        self.conv_out = nn.Conv2d(channels[-1], config.colors, 3, padding=1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.mid_block(self.conv_in(z))
        for level in self.up_blocks:
            h = level(h)
        return self.conv_norm_out(h)
