"""Refiners: denoising networks. They do not depend on the schedule, the process or the prediction type."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from dvae.errors import UserError
from dvae.layers import embeddings  # not `import mlp`, because a component of this package is named mlp
from dvae.registry.core import ComponentConfig, Registry, Shapes


@dataclass(frozen=True)
class NetworkCondition:
    """The conditions of a refiner. A part is None if the refiner is not conditioned on it."""

    image: torch.Tensor | None = None
    """x_hat, (B, condition_channels, H, W), in [-1, 1], which is concatenated to u. Zeros if dropped."""
    latent: torch.Tensor | None = None
    """z, (B, *latent), for latent guidance. Zeros if dropped."""
    label: torch.Tensor | None = None
    """Class, (B,), int64. A dropped class is `labels`, one past the last class."""

    def require(self, name: str) -> torch.Tensor:
        """Return the part called `name`. Raises ValueError if it is None."""
        value: torch.Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"this network is conditioned on condition.{name}, which was not given")
        return value


class ConditionalNetwork(nn.Module):
    """A network whose input is a state u, and x_hat if it is conditioned on images."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.shapes = shapes

    def concat_condition(self, u: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        """Concatenate u (B, k*C, H, W) and x_hat, if the network uses it: (B, shapes.input_channels, H, W)."""
        return torch.cat([u, condition.require("image")], dim=1) if self.shapes.condition_channels else u


class Refiner(ConditionalNetwork, ABC):
    """A network that maps (u, t, condition) to the predicted quantity."""

    Config: type[ComponentConfig]

    @abstractmethod
    def __init__(self, config: ComponentConfig, shapes: Shapes) -> None:
        super().__init__(shapes)

    @abstractmethod
    def forward(self, u: torch.Tensor, t_feature: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        """Return the prediction (B, shapes.output_channels, H, W) for u (B, k*C, H, W).

        t_feature (B,) is in [0, 1000]; see `Schedule.time_feature`.
        """

    def build_condition_embeddings(self, width: int) -> None:
        """Create the layers that embed z and the class as vectors of size `width`.

        A layer is None if the refiner does not have that condition. Raises UserError for latent guidance if the encoder
        has no latent.
        """
        check_latent_guidance(self.shapes)
        self.proj = embeddings.mlp(math.prod(self.shapes.latent), width) if self.shapes.condition_latent else None
        self.label_emb = nn.Embedding(self.shapes.labels + 1, width) if self.shapes.labels else None

    def add_condition_embedding(self, embedding: torch.Tensor, condition: NetworkCondition) -> torch.Tensor:
        """Return `embedding` (B, width) plus the embeddings of z and the class."""
        if self.proj is not None:
            embedding = embedding + self.proj(condition.require("latent").flatten(1))
        if self.label_emb is not None:
            embedding = embedding + self.label_emb(condition.require("label"))
        return embedding


def check_latent_guidance(shapes: Shapes) -> None:
    """Raise UserError for latent guidance if the encoder has no latent."""
    if shapes.condition_latent and (not shapes.latent or 0 in shapes.latent):
        raise UserError(
            "latent guidance needs a latent shape, but the encoder gives none: set denoiser.condition_latent=false"
        )


REFINERS: Registry[Refiner] = Registry("refiner", __package__, Refiner)
