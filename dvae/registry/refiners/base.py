"""Refiners: denoising networks. They know no schedule, process or prediction type."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from dvae.errors import UserError
from dvae.layers import embeddings  # not its `mlp` by name: that is a component of this package
from dvae.registry.core import ComponentConfig, Registry, Shapes


@dataclass(frozen=True)
class Condition:
    """What a refiner is conditioned on. A dropped condition is all zeros."""

    image: torch.Tensor | None = None
    """x_hat (B, condition_channels, H, W), in [-1, 1]; concatenated to u."""
    latent: torch.Tensor | None = None
    """z (B, *latent); latent guidance."""
    label: torch.Tensor | None = None
    """Class (B,), int64; `labels` (one past the last class) where dropped."""

    def need(self, name: str) -> torch.Tensor:
        """The part called `name`. Raises ValueError where it was not given."""
        value: torch.Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"this network is conditioned on condition.{name}, which was not given")
        return value


class Refiner(nn.Module, ABC):
    """A network from (u, t, condition) to what is predicted of u."""

    Config: type[ComponentConfig]

    @abstractmethod
    def __init__(self, config: ComponentConfig, io: Shapes) -> None:
        super().__init__()
        self.io = io

    @abstractmethod
    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: Condition) -> torch.Tensor:
        """u (B, k*C, H, W), t_feature (B,) in [0, 1000] -> (B, io.output_channels, H, W)."""

    @property
    def input_channels(self) -> int:
        """Channels of `concat_condition`."""
        return self.io.k * self.io.channels + self.io.condition_channels

    def concat_condition(self, u: torch.Tensor, condition: Condition) -> torch.Tensor:
        """u and, where there is one, x_hat: (B, input_channels, H, W)."""
        return torch.cat([u, condition.need("image")], dim=1) if self.io.condition_channels else u

    def build_condition_embeddings(self, width: int) -> None:
        """Make the layers that bring z and the class to vectors of `width`; None where there is no such condition.

        Raises UserError on latent guidance without a latent.
        """
        if self.io.condition_latent and (not self.io.latent or 0 in self.io.latent):
            raise UserError(
                "latent guidance needs a latent shape, but the encoder gives none: set denoiser.condition_latent=false"
            )
        self.proj = embeddings.mlp(math.prod(self.io.latent), width) if self.io.condition_latent else None
        self.label_emb = nn.Embedding(self.io.labels + 1, width) if self.io.labels else None

    def add_condition_embedding(self, embedding: torch.Tensor, condition: Condition) -> torch.Tensor:
        """`embedding` (B, width) with z and the class added."""
        if self.proj is not None:
            embedding = embedding + self.proj(condition.need("latent").flatten(1))
        if self.label_emb is not None:
            embedding = embedding + self.label_emb(condition.need("label"))
        return embedding


REFINERS: Registry[Refiner] = Registry("refiner", __package__, Refiner)
