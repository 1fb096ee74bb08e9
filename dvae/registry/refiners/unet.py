"""The U-Net of DiffuseVAE's refiner: OpenAI's denoising U-Net, conditioned on x_hat and on z."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from dvae.layers.activation_checkpointing import maybe_checkpoint
from dvae.layers.attention import AttentionBackend
from dvae.layers.blocks import EmbeddedSequential, Upsample, fold_patches, with_skip, zero_module
from dvae.layers.embeddings import mlp, sinusoidal
from dvae.layers.norms import GroupNorm
from dvae.layers.unet_blocks import attention_block, build_down_blocks, build_middle_block, check_unet, res_block
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.refiners.base import REFINERS, NetworkCondition, Refiner


@REFINERS.register("unet")
class UNet(Refiner):
    """OpenAI's U-Net (Dhariwal & Nichol 2021), conditioned as in DiffuseVAE (Pandey et al. 2022).

    x_hat is concatenated to the input. The embeddings of z and label are added to the time embedding. The parameters
    have the names of OpenAI's code (time_embed, input_blocks.N.M, middle_block, output_blocks, out). The layer for z
    has the name of DiffuseVAE's code (proj).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        width: int = 128
        """Channels at the finest level, a multiple of 32."""
        multipliers: list[int] = field(default_factory=lambda: [1, 2, 2, 2])
        """Channels of each level as multiples of `width`. Each level has half the resolution of the level before."""
        blocks: int = 2
        """Residual blocks per level on the way down. The way up has one more per level."""
        attention_resolutions: list[int] = field(default_factory=lambda: [16])
        """Heights, in pixels after `patch`, of the feature maps that get attention. The coarsest always gets one."""
        heads: int = 1
        """Number of attention heads."""
        attention: AttentionBackend = AttentionBackend.auto
        """Implementation of attention: auto | sdpa | xformers | math."""
        dropout: float = 0.0
        """Dropout rate before the last convolution of each residual block, in [0, 1)."""
        scale_shift_norm: bool = False
        """If true, the embedding scales and shifts the normalized features. If false, it is added to the features."""
        patch: int = 1
        """Side, in pixels, of the patches that are folded into channels. The network works at resolution image_size /
        patch."""
        groups: int = 0
        """Number of groups of GroupNorm, a divisor of `width`. 0: 32, or fewer so that a group has at least two
        channels."""
        checkpoint_blocks: bool = False
        """Recompute the activations inside blocks for the gradient instead of keeping them. This needs less memory, but
        a third more computation."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        self.config = config
        check_unet("refiner", config, shapes.image_size)
        width, embedding = config.width, 4 * config.width
        self.time_embed = mlp(width, embedding)
        self.build_condition_embeddings(embedding)
        self.input_blocks, skips = build_down_blocks(config, shapes.input_channels, shapes.image_size)
        channels = skips[-1]
        self.middle_block = build_middle_block(config, channels)

        side = shapes.image_size // config.patch // 2 ** (len(config.multipliers) - 1)
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            for block in range(config.blocks + 1):
                layers: list[nn.Module] = [res_block(config, channels + skips.pop(), multiplier * width)]
                channels = multiplier * width
                if side in config.attention_resolutions:
                    layers.append(attention_block(config, channels))
                if level > 0 and block == config.blocks:
                    layers.append(Upsample(channels))
                    side *= 2
                self.output_blocks.append(EmbeddedSequential(*layers))

        last = zero_module(nn.Conv2d(channels, shapes.output_channels * config.patch**2, 3, padding=1))
        # SiLU is part of GroupNorm here, and Identity takes its place, so that the convolution keeps its index 2
        self.out = nn.Sequential(GroupNorm(channels, silu=True, groups=config.groups), nn.Identity(), last)

    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        h = fold_patches(self.concat_condition(u, condition), self.config.patch)
        embedding = self.add_condition_embedding(self.time_embed(sinusoidal(t_feature, self.config.width)), condition)
        use_checkpoint = self.config.checkpoint_blocks
        skips = []
        for block in self.input_blocks:
            h = maybe_checkpoint(use_checkpoint, block, h, embedding)
            skips.append(h)
        h = maybe_checkpoint(use_checkpoint, self.middle_block, h, embedding)
        for block in self.output_blocks:
            h = maybe_checkpoint(use_checkpoint, with_skip, block, h, skips.pop(), embedding)
        return F.pixel_shuffle(self.out(h), self.config.patch).to(u.dtype)
