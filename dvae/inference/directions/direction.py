"""A direction: what is added to a latent to change an image, and by what it was found."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import Enum

import torch

from dvae.inference.directions.label_regression import LabelModel


class DirectionMethod(Enum):
    """How directions are found."""

    labels = "labels"
    """One to each value of each attribute of labeled images, by linear regression."""
    pca = "pca"
    """The principal components of the latents."""
    jacobian = "jacobian"
    """What moves the decoder's image most: right singular vectors of its Jacobian, over images."""


@dataclass(frozen=True)
class Direction:
    """A direction of the latent space. Strength 1 is what `unit` says."""

    name: str
    vector: torch.Tensor
    """Of the shape of one latent, fp32: what is added at strength 1; of labels, on the mean over images."""
    method: DirectionMethod
    unit: str
    """What strength 1 is, in words."""
    attribute: str = ""
    """The attribute that it is to change (empty: none in particular)."""
    value: str = ""
    """The value that it is to turn the attribute to."""
    share: float | None = None
    """Of pca: its share of the variance of latents; of jacobian: of the squared change of images."""
    model: LabelModel | None = None
    """Of labels: what is added to a latent depends on what it shows already."""

    def move(self, z: torch.Tensor, strength: float | torch.Tensor) -> torch.Tensor:
        """Latents z (B, *latent) moved by `strength`, one for all or (B,)."""
        if self.model is None:
            shift = self.vector.to(z).expand_as(z)
        else:
            attribute = list(self.model.attributes).index(self.attribute)
            shift = self.model.shift(z, attribute, self.model.attributes[self.attribute].index(self.value))
        by = torch.as_tensor(strength, dtype=z.dtype, device=z.device)
        return z + by.view(-1, *[1] * (z.ndim - 1)) * shift

    def fingerprint(self) -> str:
        """Hash of all that decides what `move` does."""
        parts = [self.vector] if self.model is None else [self.model.readout, self.model.effects]
        digest = hashlib.sha256(f"{self.attribute} {self.value}".encode())
        for part in parts:
            digest.update(part.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()
