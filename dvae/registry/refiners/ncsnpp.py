"""NCSN++, the score network of score-based models (Song et al. 2021) and of PSLD."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from dvae.layers import ncsnpp_blocks as parts
from dvae.layers.activation_checkpointing import maybe_checkpoint
from dvae.layers.attention import AttentionBackend
from dvae.layers.blocks import fold_patches, with_skip, zero_module
from dvae.layers.fir import fir_upsample, upsample
from dvae.layers.ncsnpp_blocks import NCSNAttention, NCSNBlock, TimeEmbedding
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.refiners.base import REFINERS, NetworkCondition, Refiner


@REFINERS.register("ncsnpp")
class NCSNpp(Refiner):
    """NCSN++ (Song et al. 2021, appendix H), in the form that PSLD uses (Pandey & Mandt 2023).

    x_hat is concatenated to the input. `all_modules` holds the layers in the order in which the public code constructs
    them, with the same parameter names, such as all_modules.N.Conv_0. The public code has no z and no label. Their
    layers here are `proj` and `label_emb`.
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
        attention: AttentionBackend = AttentionBackend.auto
        """Implementation of attention: auto | sdpa | xformers | math."""
        dropout: float = 0.1
        """Dropout rate before the last convolution of each residual block, in [0, 1)."""
        fir: bool = False
        """Filter feature maps with an FIR filter before downsampling and after upsampling."""
        progressive_input: bool = False
        """Add the input, downsampled and convolved, to the features of each level ("residual" in the papers)."""
        time: TimeEmbedding = TimeEmbedding.positional
        """Time embedding: positional | fourier."""
        time_scale: float = 1000.0
        """Factor on t in [0, 1] for time=positional. PSLD's public networks use 1, which hardly distinguishes small
        t."""
        fourier_scale: float = 16.0
        """Standard deviation of the frequencies for time=fourier."""
        patch: int = 1
        """Side, in pixels, of the patches that are folded into channels. The network works at resolution image_size /
        patch."""
        checkpoint_blocks: bool = False
        """Recompute the activations inside blocks for the gradient instead of keeping them. This needs less memory, but
        a third more computation."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        parts.check_ncsnpp("refiner", config, shapes.image_size)
        self.config = config
        self.build_condition_embeddings(4 * config.width)
        area = config.patch**2
        time = parts.time_layers(config)
        down, skips = parts.down_layers(
            config, shapes.input_channels * area, shapes.image_size, config.fir, config.progressive_input
        )
        middle = parts.middle_layers(config, skips[-1])
        up = self._upward(skips)
        channels = config.multipliers[0] * config.width
        out = [parts.group_norm(channels, silu=True), zero_module(parts.conv(channels, shapes.output_channels * area))]
        self.all_modules, self.sizes = parts.numbered(time, down, middle, up, out)

    def _upward(self, skips: list[int]) -> list[nn.Module]:
        """Build the layers from the coarsest level to the finest, for skip connections with `skips` channels."""
        config, skips = self.config, list(skips)
        layers: list[nn.Module] = []
        channels = skips[-1]
        side = self.shapes.image_size // config.patch // 2 ** (len(config.multipliers) - 1)
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            for _ in range(config.blocks + 1):
                layers.append(parts.res_block(config, channels + skips.pop(), multiplier * config.width))
                channels = multiplier * config.width
            if side in config.attention_resolutions:
                layers.append(NCSNAttention(channels, config.attention))
            if level > 0:
                layers.append(parts.res_block(config, channels, channels, fir_upsample if config.fir else upsample))
                side *= 2
        return layers

    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        time, down, middle, up, out = parts.split_parts(self.all_modules, self.sizes)
        use_checkpoint = self.config.checkpoint_blocks
        x = fold_patches(self.concat_condition(u, condition), self.config.patch)
        embedding = parts.embed_time(self.config, time, t_feature)
        embedding = self.add_condition_embedding(embedding, condition)
        skips = parts.run_down_layers(down, x, embedding, use_checkpoint)
        h = parts.run_layers(middle, skips[-1], embedding, use_checkpoint)
        for layer in up:
            if isinstance(layer, NCSNBlock) and layer.resample is None:
                h = maybe_checkpoint(use_checkpoint, with_skip, layer, h, skips.pop(), embedding)
            else:
                h = parts.run_layers([layer], h, embedding, use_checkpoint)
        return F.pixel_shuffle(parts.run_layers(out, h, embedding, False), self.config.patch).to(u.dtype)
