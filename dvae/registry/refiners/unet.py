"""The U-Net of DiffuseVAE's refiner: OpenAI's denoising U-Net, conditioned on x_hat and on z."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from dvae.errors import UserError
from dvae.layers.attention import AttentionBackend
from dvae.layers.blocks import AttentionBlock, Downsample, EmbeddedSequential, ResBlock, Upsample, zeroed
from dvae.layers.embeddings import mlp, sinusoidal
from dvae.layers.norms import GROUPS, GroupNorm
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.refiners import REFINERS, Condition, Refiner


@REFINERS.register("unet")
class UNet(Refiner):
    """OpenAI-style U-Net; x_hat is concatenated to the input, z is added to the time embedding.

    Dhariwal & Nichol 2021; conditioning as in DiffuseVAE (Pandey et al. 2022). Parameter names are those of OpenAI's
    code (time_embed, input_blocks.N.M, middle_block, output_blocks, out), and of the authors' for z (proj).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        width: int = 128
        """Channels at the finest level; a multiple of 32."""
        multipliers: list[int] = field(default_factory=lambda: [1, 2, 2, 2])
        """Channels of each level as multiples of `width`; each level halves the resolution of the one before."""
        blocks: int = 2
        """Residual blocks per level on the way down; the way up has one more."""
        attention_resolutions: list[int] = field(default_factory=lambda: [16])
        """Heights of the feature maps, in pixels (after `patch`), that get attention; the coarsest always has one."""
        heads: int = 1
        """Attention heads."""
        attention: AttentionBackend = AttentionBackend.auto
        """What computes attention."""
        dropout: float = 0.0
        """Dropout rate before the last convolution of each residual block."""
        scale_shift_norm: bool = False
        """Whether the embedding scales and shifts the normalised features, instead of being added to the features."""
        patch: int = 1
        """Side, in pixels, of the patches folded into channels, so that the net works at image_size / patch."""

    def __init__(self, config: Config, io: Shapes) -> None:
        super().__init__(config, io)
        self.config, self.io = config, io
        _check(config, io)
        width, embedding = config.width, 4 * config.width
        area = config.patch**2
        self.time_embed = mlp(width, embedding)
        self.proj = mlp(math.prod(io.latent), embedding) if io.condition_latent else None
        self.label_emb = nn.Embedding(io.labels + 1, embedding) if io.labels else None

        def residual(inputs: int, outputs: int) -> ResBlock:
            return ResBlock(inputs, outputs, embedding, config.dropout, config.scale_shift_norm)

        def attend(channels: int) -> AttentionBlock:
            return AttentionBlock(channels, config.heads, config.attention)

        stem = nn.Conv2d((io.k * io.channels + io.condition_channels) * area, width, 3, padding=1)
        self.input_blocks = nn.ModuleList([EmbeddedSequential(stem)])
        skips, channels, side = [width], width, io.image_size // config.patch
        for level, multiplier in enumerate(config.multipliers):
            if level > 0:
                self.input_blocks.append(EmbeddedSequential(Downsample(channels)))
                skips.append(channels)
                side //= 2
            for _ in range(config.blocks):
                layers: list[nn.Module] = [residual(channels, multiplier * width)]
                channels = multiplier * width
                if side in config.attention_resolutions:
                    layers.append(attend(channels))
                self.input_blocks.append(EmbeddedSequential(*layers))
                skips.append(channels)

        self.middle_block = EmbeddedSequential(
            residual(channels, channels), attend(channels), residual(channels, channels)
        )

        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            for block in range(config.blocks + 1):
                layers = [residual(channels + skips.pop(), multiplier * width)]
                channels = multiplier * width
                if side in config.attention_resolutions:
                    layers.append(attend(channels))
                if level > 0 and block == config.blocks:
                    layers.append(Upsample(channels))
                    side *= 2
                self.output_blocks.append(EmbeddedSequential(*layers))

        last = zeroed(nn.Conv2d(channels, io.k * io.channels * area, 3, padding=1))
        # SiLU is part of the norm; Identity keeps the numbering of the convolution
        self.out = nn.Sequential(GroupNorm(channels, silu=True), nn.Identity(), last)

    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: Condition) -> torch.Tensor:
        x = u if self.io.condition_channels == 0 else torch.cat([u, _given(condition.image, "image")], dim=1)
        h = F.pixel_unshuffle(x, self.config.patch).contiguous(memory_format=torch.channels_last)
        embedding = self._embed(t_feature, condition)
        skips = []
        for block in self.input_blocks:
            h = block(h, embedding)
            skips.append(h)
        h = self.middle_block(h, embedding)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), embedding)
        return F.pixel_shuffle(self.out(h), self.config.patch).to(u.dtype)

    def _embed(self, t_feature: torch.Tensor, condition: Condition) -> torch.Tensor:
        """The embedding of time, latent and label, (B, 4 * width)."""
        embedding = self.time_embed(sinusoidal(t_feature, self.config.width))
        if self.proj is not None:
            embedding = embedding + self.proj(_given(condition.latent, "latent").flatten(1))
        if self.label_emb is not None:
            embedding = embedding + self.label_emb(_given(condition.label, "label"))
        return embedding


def _given(value: torch.Tensor | None, name: str) -> torch.Tensor:
    if value is None:
        raise ValueError(f"this unet is conditioned on condition.{name}, which was not given")
    return value


def _check(config: UNet.Config, io: Shapes) -> None:
    """Raise UserError where the fields do not fit each other or the images."""
    if config.width < 1 or config.width % GROUPS:
        raise UserError(f"refiner.width {config.width} is not a multiple of {GROUPS} (the groups of GroupNorm)")
    if not config.multipliers or min(config.multipliers) < 1 or config.blocks < 1:
        raise UserError(
            f"refiner.multipliers {config.multipliers} and refiner.blocks {config.blocks}: give at least one level "
            "and one block, all positive"
        )
    for multiplier in config.multipliers:
        if config.heads < 1 or (multiplier * config.width) % config.heads:
            raise UserError(
                f"refiner.heads {config.heads} does not divide {multiplier * config.width} channels: use a power of 2"
            )
    factor = config.patch * 2 ** (len(config.multipliers) - 1) if config.patch > 0 else 0
    if factor == 0 or io.image_size % factor:
        raise UserError(
            f"images of {io.image_size} px do not halve {len(config.multipliers) - 1} times after refiner.patch "
            f"{config.patch}: use fewer refiner.multipliers or another patch"
        )
    sides = [io.image_size // config.patch // 2**level for level in range(len(config.multipliers))]
    foreign = sorted(set(config.attention_resolutions) - set(sides))
    if foreign:
        raise UserError(f"refiner.attention_resolutions {foreign} do not occur: the feature maps are {sides} px high")
    if io.condition_latent and not io.latent:
        raise UserError("latent guidance needs a latent shape, but the encoder gives none")
    if not 0 <= config.dropout < 1:
        raise UserError(f"refiner.dropout {config.dropout} is not in [0, 1)")
