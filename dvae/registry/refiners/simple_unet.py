"""A U-Net without attention: the smallest refiner that works at several resolutions."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from dvae.layers.activation_checkpointing import maybe_checkpoint
from dvae.layers.blocks import Downsample, EmbeddedSequential, ResBlock, Upsample, fold_patches, zero_module
from dvae.layers.embeddings import mlp, time_features
from dvae.layers.norms import GroupNorm
from dvae.layers.unet_blocks import check_levels
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.refiners.base import REFINERS, NetworkCondition, Refiner


@REFINERS.register("simple_unet")
class SimpleUNet(Refiner):
    """U-Net of residual blocks, without attention and with one skip connection per level (Ronneberger et al. 2015).

    x_hat is concatenated to the input. The embeddings of time, z and label are added to the features of every residual
    block.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        width: int = 64
        """Channels at the finest level, a multiple of 32."""
        multipliers: list[int] = field(default_factory=lambda: [1, 2, 4])
        """Channels of each level as multiples of `width`. Each level has half the resolution of the level before."""
        blocks: int = 2
        """Residual blocks per level, on the way down and on the way up."""
        dropout: float = 0.0
        """Dropout rate before the last convolution of each residual block, in [0, 1)."""
        patch: int = 1
        """Side, in pixels, of the patches that are folded into channels. The network works at resolution image_size /
        patch."""
        checkpoint_blocks: bool = False
        """Recompute the activations inside a level for the gradient instead of keeping them. This needs less memory,
        but a third more computation."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        check_levels("refiner", config, shapes.image_size, [])
        self.config = config
        embedding = 4 * config.width
        widths = [multiplier * config.width for multiplier in config.multipliers]
        self.time_embed = mlp(config.width, embedding)
        self.build_condition_embeddings(embedding)
        self.stem = nn.Conv2d(shapes.input_channels * config.patch**2, widths[0], 3, padding=1)

        def level(inputs: int, outputs: int) -> EmbeddedSequential:
            sizes = pairwise([inputs] + [outputs] * config.blocks)
            return EmbeddedSequential(*(ResBlock(a, b, embedding, config.dropout, False) for a, b in sizes))

        finer = [widths[0], *widths[:-1]]  # channels that each level receives from the next finer level
        self.down = nn.ModuleList(level(a, b) for a, b in zip(finer, widths, strict=True))
        self.shrink = nn.ModuleList(Downsample(a) for a in widths[:-1])
        self.grow = nn.ModuleList(Upsample(a) for a in widths[:0:-1])
        self.up = nn.ModuleList(level(a + b, b) for a, b in zip(widths[:0:-1], widths[-2::-1], strict=True))
        last = zero_module(nn.Conv2d(widths[0], shapes.output_channels * config.patch**2, 3, padding=1))
        self.out = nn.Sequential(GroupNorm(widths[0], silu=True), last)

    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        h = self.stem(fold_patches(self.concat_condition(u, condition), self.config.patch))
        embedding = self.add_condition_embedding(
            self.time_embed(time_features(t_feature, self.config.width // 2)), condition
        )
        use_checkpoint = self.config.checkpoint_blocks
        skips = []
        for level, shrink in zip(self.down, self.shrink, strict=False):  # the coarsest level has no skip connection
            skips.append(maybe_checkpoint(use_checkpoint, level, h, embedding))
            h = shrink(skips[-1])
        h = maybe_checkpoint(use_checkpoint, self.down[-1], h, embedding)
        for grow, level in zip(self.grow, self.up, strict=True):
            h = maybe_checkpoint(use_checkpoint, level, torch.cat([grow(h), skips.pop()], dim=1), embedding)
        return F.pixel_shuffle(self.out(h), self.config.patch).to(u.dtype)
