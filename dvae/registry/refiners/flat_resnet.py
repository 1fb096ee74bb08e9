"""A ResNet at one resolution, with z and the noise level as extra channels: the simplest refiner."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dvae.errors import UserError
from dvae.layers.activation_checkpointing import maybe_checkpoint
from dvae.layers.blocks import fold_patches, zero_module
from dvae.layers.embeddings import time_features
from dvae.layers.norms import GROUPS, GroupNorm
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.refiners.base import REFINERS, NetworkCondition, Refiner, check_latent_guidance


@REFINERS.register("flat_resnet")
class FlatResNet(Refiner):
    """Residual blocks at one resolution. z, noise level and class enter as channels that are constant over the image.

    The noise level as an input channel is from FFDNet (Zhang et al. 2018). Every block applies a 1x1 convolution to
    these channels. Because they are constant, this is a linear layer with a broadcast result. If z is a map, it is
    resized to the image instead (nearest neighbor).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        width: int = 128
        """Channels, a multiple of 32."""
        blocks: int = 8
        """Number of residual blocks, at least 1. Each extends the receptive field by two pixels in every direction."""
        dropout: float = 0.0
        """Dropout rate before the last convolution of each residual block, in [0, 1)."""
        patch: int = 1
        """Side, in pixels, of the patches that are folded into channels. The network works at resolution image_size /
        patch."""
        checkpoint_blocks: bool = False
        """Recompute the activations inside blocks for the gradient instead of keeping them. This needs less memory, but
        a third more computation."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        _check(config, shapes)
        self.config = config
        # treat a latent vector as a map of one pixel
        self.latent = shapes.latent if len(shapes.latent) == 3 else (math.prod(shapes.latent), 1, 1)
        cond_channels = config.width + shapes.labels + (self.latent[0] if shapes.condition_latent else 0)
        self.stem = nn.Conv2d(shapes.input_channels * config.patch**2, config.width, 3, padding=1)
        self.blocks = nn.ModuleList(
            FlatResBlock(config.width, cond_channels, config.dropout) for _ in range(config.blocks)
        )
        last = zero_module(nn.Conv2d(config.width, shapes.output_channels * config.patch**2, 3, padding=1))
        self.out = nn.Sequential(GroupNorm(config.width, silu=True), last)

    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        h = self.stem(fold_patches(self.concat_condition(u, condition), self.config.patch))
        cond = self._condition_map(t_feature, condition)
        for block in self.blocks:
            h = maybe_checkpoint(self.config.checkpoint_blocks, block, h, cond)
        return F.pixel_shuffle(self.out(h), self.config.patch).to(u.dtype)

    def _condition_map(self, t_feature: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        """Return noise level, class and z as a map (B, cond_channels, h, w). It has one pixel unless z is a map."""
        parts = [time_features(t_feature, self.config.width // 2)[:, :, None, None]]
        if self.shapes.labels:  # one-hot; a dropped class is all zeros
            known = F.one_hot(condition.require("label"), self.shapes.labels + 1)[:, :-1]
            parts.append(known[:, :, None, None].to(parts[0].dtype))
        if self.shapes.condition_latent:
            z = condition.require("latent").view(-1, *self.latent)
            parts = [part.expand(-1, -1, *z.shape[2:]) for part in parts] + [z]
        return torch.cat(parts, dim=1)


class FlatResBlock(nn.Module):
    """Residual block that maps h (B, width, H, W) and cond (B, cond_channels, h, w) to (B, width, H, W)."""

    def __init__(self, width: int, cond_channels: int, dropout: float) -> None:
        super().__init__()
        self.in_proj = nn.Sequential(GroupNorm(width, silu=True), nn.Conv2d(width, width, 3, padding=1))
        self.cond_proj = nn.Conv2d(cond_channels, width, 1)
        last = zero_module(nn.Conv2d(width, width, 3, padding=1))
        # no normalization here, because it would remove most of the condition, which is constant over the image
        self.out_proj = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), last)

    def forward(self, h: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        # a 1x1 convolution before the resize gives the same result as after it, with fewer operations
        spread = F.interpolate(self.cond_proj(cond), h.shape[2:])
        return h + self.out_proj(self.in_proj(h) + spread)


def _check(config: FlatResNet.Config, shapes: Shapes) -> None:
    """Raise UserError if the settings contradict each other or the shapes."""
    if config.width < 1 or config.width % GROUPS:
        raise UserError(f"refiner.width {config.width} is not a multiple of {GROUPS} (the groups of GroupNorm)")
    if config.blocks < 1:
        raise UserError(f"refiner.blocks={config.blocks}: use at least one")
    if config.patch < 1 or shapes.image_size % config.patch:
        raise UserError(f"refiner.patch {config.patch} does not divide {shapes.image_size} px: use a divisor")
    if not 0 <= config.dropout < 1:
        raise UserError(f"refiner.dropout {config.dropout} is not in [0, 1)")
    check_latent_guidance(shapes)
