"""Sources: where images come from when shards are built."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Registry, Shapes


@dataclass(frozen=True)
class Item:
    """One image of a source, resized already."""

    key: str
    """Unique within the source, stable from build to build (a file name, an index, a seed)."""
    image: np.ndarray
    """(H, W, C), uint8, H = W = shapes.image_size, C = shapes.channels."""
    labels: dict[str, str | int] = field(default_factory=dict)
    """Known attributes of the image, by name."""


class Source(ABC):
    """A finite, indexable set of images. Picklable, so that several processes can read it."""

    Config: type[ComponentConfig]
    license: str = "unknown: ask the owner of the images"
    """License of the images, with the credit it asks for; kept in the manifest."""
    protocol: str = "made at this size"
    """How the images came to their size (crop, filter); kept in the manifest."""

    @abstractmethod
    def __init__(self, config: ComponentConfig, shapes: Shapes) -> None: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Item:
        """Image number `index`. Raises dvae.data.images.DamagedImage, naming the file, where it cannot be read."""


class StreamSource(Source):
    """A distribution: any number of samples, drawn by key, so that there is nothing to keep in shards."""

    classes: tuple[str, ...] = ()
    """Names of the classes; a sample's label is an index into them."""

    @abstractmethod
    def sample(self, seed: int, numbers: Sequence[int], label: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, C, H, W), float32 in [-1, 1], and labels (B,), int64, of the samples `numbers` of `seed`.

        Each is a pure function of (seed, number, label); without `label`, number n has class n mod len(classes).
        """

    def __len__(self) -> int:
        raise self._refusal()

    def __getitem__(self, index: int) -> Item:
        raise self._refusal()

    def _refusal(self) -> UserError:
        return UserError(
            f"source {SOURCES.name_of(self)} is endless, it has no shards: leave shards out of stages=[...]"
        )


SOURCES: Registry[Source] = Registry("source", __package__, Source)
