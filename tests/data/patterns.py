"""A source that needs no package and no file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dvae.data.images import DamagedImage
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.sources.base import Item, Source


class Patterns(Source):
    """Noise images, number i seeded with i; some damaged, some twice."""

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        count: int = 50
        """Number of images."""
        damaged: int = 0
        """The first so many images cannot be read."""
        distinct: int = 0
        """Number of different images, over and over again (0: all differ)."""

    license = "CC0 1.0"

    def __init__(self, config: Config, shapes: Shapes) -> None:
        self.config, self.shapes = config, shapes

    def __len__(self) -> int:
        return self.config.count

    def __getitem__(self, index: int) -> Item:
        if index < self.config.damaged:
            raise DamagedImage(f"pattern.{index}: made so")
        shape = (self.shapes.image_size, self.shapes.image_size, self.shapes.channels)
        seed = index % self.config.distinct if self.config.distinct else index
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        return Item(f"pattern.{index}", pixels, {"parity": "odd" if index % 2 else "even", "number": index % 3})


def pixels_of(index: int, size: int = 8, channels: int = 3) -> np.ndarray:
    """What pattern number `index` looks like, (C, H, W)."""
    shape = (size, size, channels)
    return np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8).transpose(2, 0, 1)
