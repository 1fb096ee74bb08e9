"""A residual MLP, for points and other small states."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from dvae.errors import UserError
from dvae.layers.blocks import zeroed
from dvae.layers.embeddings import mlp, time_features
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.refiners import REFINERS, Condition, Refiner


@REFINERS.register("mlp")
class MLP(Refiner):
    """Residual MLP on the flattened state and condition, modulated by time and label (AdaLN: Peebles & Xie 2023).

    The time embedding is of t and of log t: positional features of t alone barely separate times below 1/1000, where a
    k = 2 process does the most.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        width: int = 128
        """Hidden units, a multiple of 4."""
        blocks: int = 4
        """Residual blocks of two layers."""

    def __init__(self, config: Config, io: Shapes) -> None:
        super().__init__(config, io)
        if config.width < 4 or config.width % 4 or config.blocks < 1:
            raise UserError(
                f"refiner.width={config.width}, refiner.blocks={config.blocks}: width must be a multiple of 4, "
                "and there must be a block"
            )
        if io.condition_latent and (not io.latent or 0 in io.latent):
            raise UserError("latent guidance needs a latent, but the encoder gives none")
        self.features = config.width // 2
        pixels = io.image_size**2
        inputs = (io.k * io.channels + io.condition_channels) * pixels
        inputs += math.prod(io.latent) if io.condition_latent else 0
        self.enter = nn.Linear(inputs, config.width)
        self.embed_time = mlp(config.width, config.width)
        self.embed_label = nn.Embedding(io.labels + 1, config.width) if io.labels else None
        self.blocks = nn.ModuleList(_Block(config.width) for _ in range(config.blocks))
        self.leave = nn.Sequential(
            nn.LayerNorm(config.width), zeroed(nn.Linear(config.width, io.output_channels * pixels))
        )

    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: Condition) -> torch.Tensor:
        seen = [u.flatten(1)]
        if self.io.condition_channels:
            seen.append(condition.need("image").flatten(1))
        if self.io.condition_latent:
            seen.append(condition.need("latent").flatten(1))
        embedding = self.embed_time(time_features(t_feature, self.features))
        if self.embed_label is not None:
            embedding = embedding + self.embed_label(condition.need("label"))
        h = self.enter(torch.cat(seen, dim=1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.leave(h).to(u.dtype).view(len(u), self.io.output_channels, *u.shape[2:])


class _Block(nn.Module):
    """h (B, width) and embedding (B, width) to (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), zeroed(nn.Linear(width, width)))

    def forward(self, h: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulate(embedding).chunk(2, dim=1)
        return h + self.layers(self.norm(h) * (1 + scale) + shift)
