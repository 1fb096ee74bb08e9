"""NCSN++, the score network of score-based models (Song et al. 2021) and of PSLD."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from dvae.errors import UserError
from dvae.layers import ncsnpp_blocks as parts
from dvae.layers.attention import AttentionBackend
from dvae.layers.blocks import zeroed
from dvae.layers.fir import double, fir_double
from dvae.layers.ncsnpp_blocks import NCSNAttention, NCSNBlock, TimeEmbedding
from dvae.layers.recompute import recomputed
from dvae.layers.trunk import check_levels
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.refiners.base import REFINERS, Condition, Refiner


@REFINERS.register("ncsnpp")
class NCSNpp(Refiner):
    """NCSN++ (Song et al. 2021, appendix H) as PSLD uses it (Pandey & Mandt 2023); x_hat is concatenated to the input.

    `all_modules` holds the layers in the order of construction of the public code, with its names: all_modules.N.Conv_0
    here is all_modules.N.Conv_0 there. z and label, which it does not know, are `proj` and `label_emb`.
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
        attention: AttentionBackend = AttentionBackend.auto
        """What computes attention."""
        dropout: float = 0.1
        """Dropout rate before the last convolution of each residual block."""
        fir: bool = False
        """Filter feature maps before they are halved and after they are doubled."""
        progressive_input: bool = False
        """Add the input, halved and convolved, to the features of each level ("residual" in the papers)."""
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
        check_levels("refiner", config, io.image_size, config.attention_resolutions)
        if config.time_scale <= 0 or config.fourier_scale <= 0:
            raise UserError(
                f"refiner.time_scale {config.time_scale} or fourier_scale {config.fourier_scale}: not above 0"
            )
        self.config = config
        self.build_condition_embeddings(4 * config.width)
        area = config.patch**2
        time = parts.time_layers(config.width, config.time, config.fourier_scale)
        down, skips = parts.downward(
            config, self.input_channels * area, io.image_size, config.fir, config.progressive_input
        )
        middle = parts.middle(config, skips[-1])
        up = self._upward(skips)
        channels = config.multipliers[0] * config.width
        out = [parts.group_norm(channels, silu=True), zeroed(parts.conv(channels, io.output_channels * area))]
        self.sizes = [len(part) for part in (time, down, middle, up, out)]
        self.all_modules = nn.ModuleList([*time, *down, *middle, *up, *out])

    def _upward(self, skips: list[int]) -> list[nn.Module]:
        """Layers from the coarsest level to the finest, given the channels of the skips."""
        config, skips = self.config, list(skips)
        layers: list[nn.Module] = []
        channels = skips[-1]
        side = self.io.image_size // config.patch // 2 ** (len(config.multipliers) - 1)
        for level, multiplier in reversed(list(enumerate(config.multipliers))):
            for _ in range(config.blocks + 1):
                layers.append(parts.residual(config, channels + skips.pop(), multiplier * config.width))
                channels = multiplier * config.width
            if side in config.attention_resolutions:
                layers.append(NCSNAttention(channels, config.attention))
            if level > 0:
                layers.append(parts.residual(config, channels, channels, fir_double if config.fir else double))
                side *= 2
        return layers

    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: Condition) -> torch.Tensor:
        modules = iter(self.all_modules)
        time, down, middle, up, out = ([next(modules) for _ in range(size)] for size in self.sizes)
        again = self.config.checkpoint_blocks
        x = F.pixel_unshuffle(self.concat_condition(u, condition), self.config.patch)
        x = x.contiguous(memory_format=torch.channels_last)
        embedding = parts.embed_time(time, t_feature / 1000.0, self.config.time_scale)
        embedding = self.add_condition_embedding(embedding, condition)
        skips = parts.descend(down, x, embedding, again)
        h = parts.through(middle, skips[-1], embedding, again)
        for layer in up:
            if isinstance(layer, NCSNBlock) and layer.resample is None:
                h = recomputed(again, _with_skip, layer, h, skips.pop(), embedding)
            else:
                h = parts.through([layer], h, embedding, again)
        return F.pixel_shuffle(parts.through(out, h, embedding, False), self.config.patch).to(u.dtype)


def _with_skip(block: nn.Module, h: torch.Tensor, skip: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
    return block(torch.cat([h, skip], dim=1), embedding)
