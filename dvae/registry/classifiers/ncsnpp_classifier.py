"""The noisy classifier of PSLD: the downward half of NCSN++, and a linear head."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from dvae.errors import UserError
from dvae.layers import ncsnpp_blocks as parts
from dvae.layers.attention import AttentionBackend
from dvae.layers.ncsnpp_blocks import TimeEmbedding
from dvae.layers.trunk import check_levels
from dvae.registry.classifiers.base import CLASSIFIERS, Classifier
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.refiners.base import Condition


@CLASSIFIERS.register("ncsnpp_classifier")
class NCSNppClassifier(Classifier):
    """Downward half of NCSN++ and a linear layer on all features; x_hat is concatenated to the input.

    Pandey & Mandt 2023. `all_modules` holds the layers in the order of construction of the public code.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        width: int = 128
        """Channels at the finest level; a multiple of 32."""
        multipliers: list[int] = field(default_factory=lambda: [1, 2, 2, 2])
        """Channels of each level as multiples of `width`; each level halves the resolution of the one before."""
        blocks: int = 2
        """Residual blocks per level."""
        attention_resolutions: list[int] = field(default_factory=lambda: [16])
        """Heights of the feature maps, in pixels (after `patch`), that get attention; the coarsest always has one."""
        attention: AttentionBackend = AttentionBackend.auto
        """What computes attention."""
        dropout: float = 0.1
        """Dropout rate before the last convolution of each residual block."""
        time: TimeEmbedding = TimeEmbedding.positional
        """positional or fourier."""
        time_scale: float = 1000.0
        """For positional: what t in [0, 1] is multiplied by; PSLD's public networks have 1, which blurs small t."""
        fourier_scale: float = 16.0
        """For fourier: standard deviation of the frequencies."""
        patch: int = 1
        """Side, in pixels, of the patches folded into channels, so that the net works at image_size / patch."""
        checkpoint_blocks: bool = False
        """Compute activations inside blocks again for the gradient, not keep them: less memory, a third more work."""

    def __init__(self, config: Config, io: Shapes) -> None:
        super().__init__(config, io)
        check_levels("classifier", config, io.image_size, config.attention_resolutions)
        if config.time_scale <= 0 or config.fourier_scale <= 0:
            raise UserError(
                f"classifier.time_scale {config.time_scale} or fourier_scale {config.fourier_scale}: not above 0"
            )
        self.config, self.io = config, io
        inputs = (io.k * io.channels + io.condition_channels) * config.patch**2
        time = parts.time_layers(config.width, config.time, config.fourier_scale)
        down, skips = parts.downward(config, inputs, io.image_size)
        middle = parts.middle(config, skips[-1])
        side = io.image_size // config.patch // 2 ** (len(config.multipliers) - 1)
        self.sizes = [len(part) for part in (time, down, middle)]
        head = nn.Linear(skips[-1] * side**2, io.labels, bias=False)
        self.all_modules = nn.ModuleList([*time, *down, *middle, head])

    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: Condition) -> torch.Tensor:
        modules = iter(self.all_modules)
        time, down, middle = ([next(modules) for _ in range(size)] for size in self.sizes)
        x = torch.cat([u, condition.need("image")], dim=1) if self.io.condition_channels else u
        x = F.pixel_unshuffle(x, self.config.patch).contiguous(memory_format=torch.channels_last)
        embedding = parts.embed_time(time, t_feature / 1000.0, self.config.time_scale)
        again = self.config.checkpoint_blocks
        skips = parts.descend(down, x, embedding, again)
        h = parts.through(middle, skips[-1], embedding, again)
        return self.all_modules[-1](h.flatten(1)).float()
