"""A recognizer of attributes: a small network with one head for each attribute, trained on real images only."""

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
"""Smallest kappa with which an attribute counts as recognizable, measured on held-out real images.

Kappa is (accuracy - chance) / (1 - chance). 0 is as good as always answering the most frequent value, 1 is perfect."""


@dataclass(frozen=True)
class AttributeRecognizer:
    """A trained network that recognizes every attribute of an image, and its accuracy."""

    network: nn.Module
    """Images in [-1, 1] to the logits of all attributes, side by side."""
    attributes: LabeledAttributes
    """The A attributes and their values."""
    accuracy: list[float]
    """For each attribute, the share of held-out real images on which the network is right."""
    chance: list[float]
    """For each attribute, the share of the most frequent value among held-out real images."""

    @property
    def recognizable(self) -> list[bool]:
        """Whether the network recognizes each attribute, see MIN_KAPPA."""
        pairs = zip(self.accuracy, self.chance, strict=True)
        return [chance < 1 and (right - chance) / (1 - chance) >= MIN_KAPPA for right, chance in pairs]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Recognize the values of all attributes, (N, A) int64, in images (N, C, H, W) uint8."""
        return predict(self.network, images, self.attributes.sizes)


@torch.no_grad()
def predict(network: nn.Module, images: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The most probable value of each attribute, (N, A) int64, for images (N, C, H, W) uint8."""
    logits = torch.cat([network(to_float(part)) for part in images.split(64)])
    return torch.stack([head.argmax(1) for head in logits.split(sizes, 1)], 1)


def train_attribute_recognizer(
    shards: Shards, heldout: Shards, attributes: LabeledAttributes, *, steps: int, batch: int, seed: int
) -> AttributeRecognizer:
    """Train a recognizer of all `attributes` on the real images `shards`, and measure its accuracy on `heldout`.

    `steps` is the number of training steps, and `batch` the number of images per step.
    """
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
