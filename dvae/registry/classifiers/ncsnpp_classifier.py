"""The noisy classifier of PSLD: the encoder half of NCSN++ with a linear head."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from dvae.layers import ncsnpp_blocks as parts
from dvae.layers.attention import AttentionBackend
from dvae.layers.blocks import fold_patches
from dvae.layers.ncsnpp_blocks import TimeEmbedding
from dvae.registry.classifiers.base import CLASSIFIERS, Classifier
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.refiners.base import NetworkCondition


@CLASSIFIERS.register("ncsnpp_classifier")
class NCSNppClassifier(Classifier):
    """Encoder half of NCSN++ with a linear layer on all features; x_hat is concatenated to the input.

    Pandey & Mandt 2023. `all_modules` holds the layers in the order in which the public code constructs them.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        width: int = 128
        """Channels at the finest level; a multiple of 32."""
        multipliers: list[int] = field(default_factory=lambda: [1, 2, 2, 2])
        """Channels of each level, as multiples of `width`. Each level has half the resolution of the level before."""
        blocks: int = 2
        """Residual blocks per level."""
        attention_resolutions: list[int] = field(default_factory=lambda: [16])
        """Heights in pixels, after `patch`, of the maps that get attention. The coarsest map always gets it."""
        attention: AttentionBackend = AttentionBackend.auto
        """Implementation that computes attention."""
        dropout: float = 0.1
        """Dropout rate before the last convolution of each residual block."""
        time: TimeEmbedding = TimeEmbedding.positional
        """Embedding of the time: positional or fourier."""
        time_scale: float = 1000.0
        """For positional: factor on t in [0, 1]. PSLD's public networks use 1, which hardly separates small t."""
        fourier_scale: float = 16.0
        """For fourier: standard deviation of the random frequencies."""
        patch: int = 1
        """Side, in pixels, of the patches that are folded into channels. The network works at image_size / patch."""
        checkpoint_blocks: bool = False
        """Activation checkpointing: recompute activations in the backward pass. Less memory, a third more compute."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        parts.check_ncsnpp("classifier", config, shapes.image_size)
        self.config = config
        inputs = shapes.input_channels * config.patch**2
        time = parts.time_layers(config)
        down, skips = parts.down_layers(config, inputs, shapes.image_size)
        middle = parts.middle_layers(config, skips[-1])
        side = shapes.image_size // config.patch // 2 ** (len(config.multipliers) - 1)
        head = nn.Linear(skips[-1] * side**2, shapes.labels, bias=False)
        self.all_modules, self.sizes = parts.numbered(time, down, middle, [head])

    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        time, down, middle, head = parts.split_parts(self.all_modules, self.sizes)
        x = fold_patches(self.concat_condition(u, condition), self.config.patch)
        embedding = parts.embed_time(self.config, time, t_feature)
        use_checkpoint = self.config.checkpoint_blocks
        skips = parts.run_down_layers(down, x, embedding, use_checkpoint)
        h = parts.run_layers(middle, skips[-1], embedding, use_checkpoint)
        return head[0](h.flatten(1)).float()
