"""A recognizer of attributes: a small network with a head per attribute, trained on real images alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dvae.data.images import to_float
from dvae.data.shards.reader import Shards
from dvae.evaluation import recognizer
from dvae.inference.directions.attributes import LabeledAttributes, labeled_images

MIN_KAPPA = 0.5
"""Cohen's kappa (0: as good as always answering the most frequent value, 1: always right) on held-out real images from
which on an attribute counts as recognizable."""


@dataclass(frozen=True)
class AttributeRecognizer:
    """A network that recognizes every attribute of an image."""

    network: nn.Module
    attributes: LabeledAttributes
    accuracy: list[float]
    """Share of held-out real images of which it recognizes each attribute rightly."""
    chance: list[float]
    """Share of the most frequent value among them."""

    @property
    def recognizable(self) -> list[bool]:
        """Which attributes it recognizes, see MIN_KAPPA."""
        pairs = zip(self.accuracy, self.chance, strict=True)
        return [chance < 1 and (right - chance) / (1 - chance) >= MIN_KAPPA for right, chance in pairs]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """The value of each attribute, (N, A), int64, of images (N, C, H, W) uint8."""
        return predict(self.network, images, self.attributes.sizes)


@torch.no_grad()
def predict(network: nn.Module, images: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The likeliest value of each attribute, (N, A), int64, of images (N, C, H, W) uint8."""
    logits = torch.cat([network(to_float(part)) for part in images.split(64)])
    return torch.stack([head.argmax(1) for head in logits.split(sizes, 1)], 1)


def train_attribute_recognizer(
    shards: Shards, heldout: Shards, attributes: LabeledAttributes, *, steps: int, batch: int, seed: int
) -> AttributeRecognizer:
    """A recognizer of all `attributes`, trained on the real images `shards` and tried on `heldout`."""
    codes = attributes.codes(shards)

    def read(indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        images = shards.read(indices)
        return images, codes[torch.from_numpy(shards.substituted(indices))]

    def loss(network: nn.Module, x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        heads = network(x).split(attributes.sizes, 1)
        return sum((F.cross_entropy(head, targets[:, i]) for i, head in enumerate(heads)), x.new_zeros(()))

    network = recognizer.fit_network(
        read, len(shards), sum(attributes.sizes), loss, steps=steps, batch=batch, seed=seed
    )
    images, truth = labeled_images(heldout, attributes)
    right = predict(network, images, attributes.sizes) == truth
    chance = [float(torch.bincount(truth[:, i]).max()) / len(truth) for i in range(truth.shape[1])]
    return AttributeRecognizer(network, attributes, right.double().mean(0).tolist(), chance)
