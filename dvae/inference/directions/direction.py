"""A direction of the latent space: a change of a latent that changes an image in a certain way."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum

import torch

from dvae.inference.directions.label_regression import LabelModel


class DirectionMethod(Enum):
    """How directions are found."""

    labels = "labels"
    """One direction for each value of each attribute of labeled images, by linear regression."""
    pca = "pca"
    """The principal components of the latents."""
    jacobian = "jacobian"
    """The directions that change the decoder's image most: right singular vectors of its Jacobian, over images."""


@dataclass(frozen=True)
class Direction:
    """A direction of the latent space."""

    name: str
    vector: torch.Tensor
    """The vector that is added at strength 1, in the shape of one latent, fp32. For method labels it is a mean over
    images, because the added vector depends on the latent."""
    method: DirectionMethod
    """How the direction was found."""
    unit: str
    """Description of strength 1."""
    attribute: str = ""
    """The attribute that the direction changes (empty: no particular attribute)."""
    value: str = ""
    """The value that the attribute is changed to."""
    share: float | None = None
    """For pca: the share of the variance of latents. For jacobian: the share of the squared change of images."""
    model: LabelModel | None = None
    """For labels: the regression that gives the vector to add, depending on what the latent shows."""

    def move(self, z: torch.Tensor, strength: float | torch.Tensor) -> torch.Tensor:
        """Move latents z (B, *latent) by `strength`, a number for all latents or (B,). Returns the moved latents."""
        if self.model is None:
            shift = self.vector.to(z).expand_as(z)
        else:
            attribute = list(self.model.attributes).index(self.attribute)
            shift = self.model.shift(z, attribute, self.model.attributes[self.attribute].index(self.value))
        by = torch.as_tensor(strength, dtype=z.dtype, device=z.device)
        return z + by.view(-1, *[1] * (z.ndim - 1)) * shift

    def fingerprint(self) -> str:
        """Return the SHA-256 of everything that decides the result of `move`."""
        parts = [self.vector] if self.model is None else [self.model.readout, self.model.effects]
        digest = hashlib.sha256(f"{self.attribute} {self.value}".encode())
        for part in parts:
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
