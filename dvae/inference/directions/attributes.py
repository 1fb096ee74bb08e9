"""Read the labels of images, attribute by attribute."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dvae.data.shards.reader import Shards
from dvae.errors import UserError

MAX_VALUES = 50
"""Maximum number of values of an attribute. An attribute with more values is a measurement, not a category."""


@dataclass(frozen=True)
class LabeledAttributes:
    """The attributes in which images differ, and their values."""

    values: dict[str, list[str]]
    """Values of each attribute."""
    skipped: dict[str, str]
    """Attributes that are left out, with the reason."""

    @property
    def names(self) -> list[str]:
        return list(self.values)

    @property
    def sizes(self) -> list[int]:
        """Number of values of each attribute."""
        return [len(values) for values in self.values.values()]

    @classmethod
    def from_shards(cls, shards: Shards) -> LabeledAttributes:
        """Collect the attributes of labeled images. Raises UserError if no attribute can be used."""
        values, skipped = {}, {}
        for name, known in shards.labels.items():
            if len(known) < 2:
                skipped[name] = "is the same in all images"
            elif len(known) > MAX_VALUES:
                skipped[name] = f"takes {len(known)} values, more than {MAX_VALUES}"
            else:
                values[name] = [str(value) for value in known]
        if not values:
            raise UserError(
                f"shards at {shards.folder} have no labels that images differ in: name labeled ones, shards=FOLDER, "
                "or find=[pca,jacobian]"
            )
        return cls(values, skipped)

    def codes(self, shards: Shards) -> torch.Tensor:
        """Return the index of the value of each attribute of each image, (N, A) int64.

        Raises UserError if an image lacks an attribute.
        """
        return torch.stack([shards.classes(name, values) for name, values in self.values.items()], 1)


def labeled_images(
    shards: Shards, attributes: LabeledAttributes, n: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read the first n images (None: all) of a split, (n, C, H, W) uint8, and their attribute codes, (n, A) int64."""
    indices = np.arange(len(shards) if n is None else n)
    images = shards.read(indices)
    # an image that cannot be read is substituted by another, so take the labels of the substitute
    return images, attributes.codes(shards)[torch.from_numpy(shards.substituted(indices))]
