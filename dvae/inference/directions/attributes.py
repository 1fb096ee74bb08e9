"""The labels of images, attribute by attribute."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dvae.data.shards.reader import Shards
from dvae.errors import UserError

MAX_VALUES = 50
"""An attribute of more values than these is a measure, not a choice of parts."""


@dataclass(frozen=True)
class LabeledAttributes:
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
    def from_shards(cls, shards: Shards) -> LabeledAttributes:
        """The attributes of labeled images. Raises UserError where there are none."""
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
        """Number of the value of each attribute of each image, (N, A), int64.

        Raises UserError where an image lacks an attribute.
        """
        return torch.stack([shards.classes(name, values) for name, values in self.values.items()], 1)


def labeled_images(
    shards: Shards, attributes: LabeledAttributes, n: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first n images (None: all) of a split, (n, C, H, W) uint8, and the codes of what they show, (n, A)."""
    indices = np.arange(len(shards) if n is None else n)
    images = shards.read(indices)
    return images, attributes.codes(shards)[torch.from_numpy(shards.substituted(indices))]
