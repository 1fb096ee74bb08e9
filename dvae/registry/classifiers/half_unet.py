"""The noisy classifier of Dhariwal & Nichol (2021): the encoder half of their U-Net with a pooling head."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from dvae.layers.attention import AttentionBackend
from dvae.layers.blocks import fold_patches
from dvae.layers.embeddings import mlp, sinusoidal
from dvae.layers.norms import GroupNorm
from dvae.layers.pooling import AttentionPool
from dvae.layers.unet_blocks import build_down_blocks, build_middle_block, check_unet
from dvae.registry.classifiers.base import CLASSIFIERS, Classifier
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.refiners.base import NetworkCondition


@CLASSIFIERS.register("half_unet")
class HalfUNet(Classifier):
    """Encoder half of OpenAI's U-Net with attention pooling; x_hat is concatenated to the input.

    Dhariwal & Nichol 2021, section 4.3. Strided convolutions halve the resolution, as in `unet`. The released
    classifiers use residual blocks for that.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        width: int = 128
        """Channels at the finest level; a multiple of 32."""
        multipliers: list[int] = field(default_factory=lambda: [1, 2, 2, 2])
        """Channels of each level, as multiples of `width`. Each level has half the resolution of the level before."""
        blocks: int = 2
        """Residual blocks per level."""
        attention_resolutions: list[int] = field(default_factory=lambda: [16, 8])
        """Heights in pixels, after `patch`, of the maps that get attention. The coarsest map always gets it."""
        heads: int = 4
        """Number of attention heads, also in the attention pooling."""
        attention: AttentionBackend = AttentionBackend.auto
        """Implementation that computes attention."""
        dropout: float = 0.0
        """Dropout rate before the last convolution of each residual block."""
        scale_shift_norm: bool = True
        """True: the embedding scales and shifts the normalized features. False: it is added to the features."""
        patch: int = 1
        """Side, in pixels, of the patches that are folded into channels. The network works at image_size / patch."""
        groups: int = 0
        """Number of groups of GroupNorm; must divide `width`. 0: 32, or fewer so that each has two channels."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        check_unet("classifier", config, shapes.image_size)
        self.config = config
        self.time_embed = mlp(config.width, 4 * config.width)
        self.input_blocks, outputs = build_down_blocks(config, shapes.input_channels, shapes.image_size)
        channels = outputs[-1]
        self.middle_block = build_middle_block(config, channels)
        side = shapes.image_size // config.patch // 2 ** (len(config.multipliers) - 1)
        pool = AttentionPool(channels, side, config.heads, shapes.labels, config.attention)
        # SiLU is part of the norm; Identity takes its place, so that the pooling keeps its index and parameter names
        self.out = nn.Sequential(GroupNorm(channels, silu=True, groups=config.groups), nn.Identity(), pool)

    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        h = fold_patches(self.concat_condition(u, condition), self.config.patch)
        embedding = self.time_embed(sinusoidal(t_feature, self.config.width))
        for block in self.input_blocks:
            h = block(h, embedding)
        return self.out(self.middle_block(h, embedding)).float()
