"""A ResNet at one resolution, to which z and the noise level are channels like any other: the simplest refiner."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dvae.errors import UserError
from dvae.layers.blocks import zeroed
from dvae.layers.embeddings import time_features
from dvae.layers.norms import GROUPS, GroupNorm
from dvae.layers.recompute import recomputed
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.refiners.base import REFINERS, Condition, Refiner


@REFINERS.register("flat_resnet")
class FlatResNet(Refiner):
    """Residual blocks at one resolution; z, noise level and class enter as channels that are equal at every pixel.

    The noise level as an input channel is due to FFDNet (Zhang et al. 2018). Every block sees these channels through a
    1x1 convolution; as they are constant, that is a linear layer whose result is broadcast. A latent map is stretched
    over the image instead (nearest neighbor).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        width: int = 128
        """Channels; a multiple of 32."""
        blocks: int = 8
        """Residual blocks; each lets a pixel see two pixels further in every direction."""
        dropout: float = 0.0
        """Dropout rate before the last convolution of each residual block."""
        patch: int = 1
        """Side, in pixels, of the patches folded into channels, so that the net works at image_size / patch."""
        checkpoint_blocks: bool = False
        """Compute activations inside blocks again for the gradient, not keep them: less memory, a third more work."""

    def __init__(self, config: Config, io: Shapes) -> None:
        super().__init__(config, io)
        _check(config, io)
        self.config = config
        # a latent vector is a map of one pixel
        self.latent = io.latent if len(io.latent) == 3 else (math.prod(io.latent), 1, 1)
        told = config.width + io.labels + (self.latent[0] if io.condition_latent else 0)
        self.stem = nn.Conv2d(self.input_channels * config.patch**2, config.width, 3, padding=1)
        self.blocks = nn.ModuleList(_Block(config.width, told, config.dropout) for _ in range(config.blocks))
        last = zeroed(nn.Conv2d(config.width, io.output_channels * config.patch**2, 3, padding=1))
        self.out = nn.Sequential(GroupNorm(config.width, silu=True), last)

    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: Condition) -> torch.Tensor:
        x = F.pixel_unshuffle(self.concat_condition(u, condition), self.config.patch)
        h = self.stem(x.contiguous(memory_format=torch.channels_last))
        told = self._told(t_feature, condition)
        for block in self.blocks:
            h = recomputed(self.config.checkpoint_blocks, block, h, told)
        return F.pixel_shuffle(self.out(h), self.config.patch).to(u.dtype)

    def _told(self, t_feature: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Noise level, class and z as a map (B, told, h, w), of one pixel unless z is a map."""
        parts = [time_features(t_feature, self.config.width // 2)[:, :, None, None]]
        if self.io.labels:  # one-hot; a dropped class is all zeros
            known = F.one_hot(condition.need("label"), self.io.labels + 1)[:, :-1]
            parts.append(known[:, :, None, None].to(parts[0].dtype))
        if self.io.condition_latent:
            z = condition.need("latent").view(-1, *self.latent)
            parts = [part.expand(-1, -1, *z.shape[2:]) for part in parts] + [z]
        return torch.cat(parts, dim=1)


class _Block(nn.Module):
    """h (B, width, H, W), told (B, told, h, w) to (B, width, H, W)."""

    def __init__(self, width: int, told: int, dropout: float) -> None:
        super().__init__()
        self.enter = nn.Sequential(GroupNorm(width, silu=True), nn.Conv2d(width, width, 3, padding=1))
        self.tell = nn.Conv2d(told, width, 1)
        last = zeroed(nn.Conv2d(width, width, 3, padding=1))
        # no norm here: it would take most of what is constant over the image out again
        self.leave = nn.Sequential(nn.SiLU(), nn.Dropout(dropout), last)

    def forward(self, h: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        spread = F.interpolate(self.tell(told), h.shape[2:])  # the same as convolving the channels once stretched
        return h + self.leave(self.enter(h) + spread)


def _check(config: FlatResNet.Config, io: Shapes) -> None:
    """Raise UserError where the fields do not fit each other or the images."""
    if config.width < 1 or config.width % GROUPS:
        raise UserError(f"refiner.width {config.width} is not a multiple of {GROUPS} (the groups of GroupNorm)")
    if config.blocks < 1:
        raise UserError(f"refiner.blocks {config.blocks}: give at least one")
    if config.patch < 1 or io.image_size % config.patch:
        raise UserError(f"refiner.patch {config.patch} does not divide {io.image_size} px: use a divisor")
    if not 0 <= config.dropout < 1:
        raise UserError(f"refiner.dropout {config.dropout} is not in [0, 1)")
    if io.condition_latent and (not io.latent or 0 in io.latent):
        raise UserError(
            "latent guidance needs a latent shape, but the encoder gives none: set denoiser.condition_latent=false"
        )
