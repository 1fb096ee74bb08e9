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
class NetworkCondition:
    """What a refiner is conditioned on. A dropped condition is all zeros."""

    image: torch.Tensor | None = None
    """x_hat (B, condition_channels, H, W), in [-1, 1]; concatenated to u."""
    latent: torch.Tensor | None = None
    """z (B, *latent); latent guidance."""
    label: torch.Tensor | None = None
    """Class (B,), int64; `labels` (one past the last class) where dropped."""

    def require(self, name: str) -> torch.Tensor:
        """The part called `name`. Raises ValueError where it was not given."""
        value: torch.Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"this network is conditioned on condition.{name}, which was not given")
        return value


class ConditionalNetwork(nn.Module):
    """A network whose input is a state u and, if it is conditioned on images, x_hat."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.shapes = shapes

    def concat_condition(self, u: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        """u and, if there is one, x_hat: (B, shapes.input_channels, H, W)."""
        return torch.cat([u, condition.require("image")], dim=1) if self.shapes.condition_channels else u


class Refiner(ConditionalNetwork, ABC):
    """A network from (u, t, condition) to what is predicted of u."""

    Config: type[ComponentConfig]

    @abstractmethod
    def __init__(self, config: ComponentConfig, shapes: Shapes) -> None:
        super().__init__(shapes)

    @abstractmethod
    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        """u (B, k*C, H, W), t_feature (B,) in [0, 1000] -> (B, shapes.output_channels, H, W)."""

    def build_condition_embeddings(self, width: int) -> None:
        """Make the layers that bring z and the class to vectors of `width`; None where there is no such condition.

        Raises UserError on latent guidance without a latent.
        """
        check_latent_guidance(self.shapes)
        self.proj = embeddings.mlp(math.prod(self.shapes.latent), width) if self.shapes.condition_latent else None
        self.label_emb = nn.Embedding(self.shapes.labels + 1, width) if self.shapes.labels else None

    def add_condition_embedding(self, embedding: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        """`embedding` (B, width) with z and the class added."""
        if self.proj is not None:
            embedding = embedding + self.proj(condition.require("latent").flatten(1))
        if self.label_emb is not None:
            embedding = embedding + self.label_emb(condition.require("label"))
        return embedding


def check_latent_guidance(shapes: Shapes) -> None:
    """Raise UserError on latent guidance without a latent."""
    if shapes.condition_latent and (not shapes.latent or 0 in shapes.latent):
        raise UserError(
            "latent guidance needs a latent shape, but the encoder gives none: set denoiser.condition_latent=false"
        )


REFINERS: Registry[Refiner] = Registry("refiner", __package__, Refiner)
