"""What labeled images show, attribute by attribute; and a judge that tells it of any image.

The judge is one small network with a head per attribute (dvae/evaluation/recognizer.py), trained on real images alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dvae.data.images import to_float
from dvae.data.shards.reader import Shards
from dvae.errors import UserError
from dvae.evaluation import recognizer

MOST_VALUES = 50
"""An attribute of more values than these is a measure, not a choice of parts."""
TOLD = 0.5
"""Cohen's kappa (0: as good as always answering the most frequent value, 1: always right) on held-out real images from
which on the judge counts as able to tell an attribute."""


@dataclass(frozen=True)
class Attributes:
    """Attributes that images differ in, and the values that each takes."""

    values: dict[str, list[str]]
    skipped: dict[str, str]
    """The others, and why they are left out."""

    @property
    def names(self) -> list[str]:
        return list(self.values)

    @property
    def sizes(self) -> list[int]:
        """Number of values of each."""
        return [len(values) for values in self.values.values()]

    @classmethod
    def of(cls, shards: Shards) -> Attributes:
        """Those of labeled images. Raises UserError where there are none."""
        values, skipped = {}, {}
        for name, known in shards.labels.items():
            if len(known) < 2:
                skipped[name] = "is the same in all images"
            elif len(known) > MOST_VALUES:
                skipped[name] = f"takes {len(known)} values, more than {MOST_VALUES}"
            else:
                values[name] = [str(value) for value in known]
        if not values:
            raise UserError(
                f"shards at {shards.folder} have no labels that images differ in: name labeled ones, shards=FOLDER, "
                "or find=[pca,jacobian]"
            )
        return cls(values, skipped)

    def codes(self, shards: Shards) -> torch.Tensor:
        """Number of the value of each attribute of each image, (N, A), int64.

        Raises UserError where an image lacks an attribute.
        """
        return torch.stack([shards.classes(name, values) for name, values in self.values.items()], 1)


@dataclass(frozen=True)
class AttributeJudge:
    """A network that tells every attribute of an image."""

    network: nn.Module
    attributes: Attributes
    accuracy: list[float]
    """Share of held-out real images of which it tells each attribute rightly."""
    chance: list[float]
    """Share of the most frequent value among them."""

    @property
    def told(self) -> list[bool]:
        """Which attributes it can tell, see TOLD."""
        pairs = zip(self.accuracy, self.chance, strict=True)
        return [chance < 1 and (right - chance) / (1 - chance) >= TOLD for right, chance in pairs]

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """The value of each attribute, (N, A), int64, of images (N, C, H, W) uint8."""
        return read(self.network, images, self.attributes.sizes)


@torch.no_grad()
def read(network: nn.Module, images: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The likeliest value of each attribute, (N, A), int64, of images (N, C, H, W) uint8."""
    logits = torch.cat([network(to_float(part)) for part in images.split(64)])
    return torch.stack([head.argmax(1) for head in logits.split(sizes, 1)], 1)


def train(
    shards: Shards, heldout: Shards, attributes: Attributes, *, steps: int, batch: int, seed: int
) -> AttributeJudge:
    """A judge of all `attributes`, trained on the real images `shards` and tried on `heldout`."""
    codes = attributes.codes(shards)

    def draw(indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        images = shards.read(indices)
        return images, codes[torch.from_numpy(shards.substituted(indices))]

    def loss(network: nn.Module, x: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        heads = network(x).split(attributes.sizes, 1)
        return sum((F.cross_entropy(head, known[:, i]) for i, head in enumerate(heads)), x.new_zeros(()))

    network = recognizer.fit_network(
        draw, len(shards), sum(attributes.sizes), loss, steps=steps, batch=batch, seed=seed
    )
    images, truth = pictured(heldout, attributes)
    right = read(network, images, attributes.sizes) == truth
    chance = [float(torch.bincount(truth[:, i]).max()) / len(truth) for i in range(truth.shape[1])]
    return AttributeJudge(network, attributes, right.double().mean(0).tolist(), chance)


def pictured(shards: Shards, attributes: Attributes, n: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The first n images (None: all) of a split, (n, C, H, W) uint8, and the codes of what they show, (n, A)."""
    indices = np.arange(len(shards) if n is None else n)
    images = shards.read(indices)
    return images, attributes.codes(shards)[torch.from_numpy(shards.substituted(indices))]
