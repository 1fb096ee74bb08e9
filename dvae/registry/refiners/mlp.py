"""A residual MLP, for points and other small states."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from dvae.errors import UserError
from dvae.layers.blocks import zero_module
from dvae.layers.embeddings import mlp, time_features
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.refiners.base import REFINERS, NetworkCondition, Refiner, check_latent_guidance

SINE_GAIN = 3.0
"""Factor on the initial weights before a sine. It is above 1, so that the sine is not close to linear."""


@REFINERS.register("mlp")
class MLP(Refiner):
    """Residual MLP on the flattened state and condition, modulated by time and label (AdaLN: Peebles & Xie 2023).

    An MLP learns fine structure last. So this one has Fourier features of the input (Tancik et al. 2020), and sines
    instead of rectifiers (Sitzmann et al. 2020). The time embedding uses t and log t, because positional features of t
    alone barely distinguish times below 1/1000.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        width: int = 128
        """Number of hidden units, a multiple of 4."""
        blocks: int = 4
        """Number of residual blocks, at least 1. Each has two layers."""
        frequencies: int = 64
        """Number of random Fourier features of the input. 0: none."""
        bandwidth: float = 1.0
        """Standard deviation of the angular frequencies of the Fourier features. The default is for inputs of about
        unit variance."""

    waves: torch.Tensor
    """Angular frequencies of the Fourier features, (inputs, frequencies)."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        if config.width < 4 or config.width % 4 or config.blocks < 1 or config.frequencies < 0:
            raise UserError(
                f"refiner.width={config.width}, blocks={config.blocks}, frequencies={config.frequencies}: use a "
                "multiple of 4, one block or more, 0 frequencies or more"
            )
        check_latent_guidance(shapes)
        self.features = config.width // 2
        pixels = shapes.image_size**2
        inputs = shapes.input_channels * pixels
        inputs += math.prod(shapes.latent) if shapes.condition_latent else 0
        self.register_buffer("waves", config.bandwidth * torch.randn(inputs, config.frequencies))
        self.in_proj = nn.Linear(inputs + 2 * config.frequencies, config.width)
        self.embed_time = mlp(config.width, config.width)
        self.embed_label = nn.Embedding(shapes.labels + 1, config.width) if shapes.labels else None
        self.blocks = nn.ModuleList(MLPBlock(config.width) for _ in range(config.blocks))
        self.out_proj = nn.Sequential(
            nn.LayerNorm(config.width), zero_module(nn.Linear(config.width, shapes.output_channels * pixels))
        )

    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        inputs = [self.concat_condition(u, condition).flatten(1)]
        if self.shapes.condition_latent:
            inputs.append(condition.require("latent").flatten(1))
        embedding = self.embed_time(time_features(t_feature, self.features))
        if self.embed_label is not None:
            embedding = embedding + self.embed_label(condition.require("label"))
        x = torch.cat(inputs, dim=1)
        angles = x @ self.waves
        h = self.in_proj(torch.cat([x, torch.cos(angles), torch.sin(angles)], dim=1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.out_proj(h).to(u.dtype).view(len(u), self.shapes.output_channels, *u.shape[2:])


class MLPBlock(nn.Module):
    """Residual block that maps h (B, width) and embedding (B, width) to (B, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulate = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.first, self.second = nn.Linear(width, width), zero_module(nn.Linear(width, width))
        with torch.no_grad():
            self.first.weight *= SINE_GAIN

    def forward(self, h: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        scale, shift = self.modulate(embedding).chunk(2, dim=1)
        return h + self.second(torch.sin(self.first(self.norm(h) * (1 + scale) + shift)))
