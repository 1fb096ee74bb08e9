"""Sources: the images from which shards are built."""

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
    """One image of a source, already resized."""

    key: str
    """Key that is unique within the source and the same in every build, such as a file name, an index or a seed."""
    image: np.ndarray
    """Pixels (H, W, C), uint8, with H = W = shapes.image_size and C = shapes.channels."""
    labels: dict[str, str | int] = field(default_factory=dict)
    """Known attributes of the image: name -> value."""


class Source(ABC):
    """Base class of sources: a finite set of images that are read by index.

    A source must be picklable, because several processes read it.
    """

    Config: type[ComponentConfig]
    license: str = "unknown: ask the owner of the images"
    """License of the images, with the credit that it requires. It is stored in the manifest."""
    protocol: str = "made at this size"
    """How the images were brought to their size (crop, filter). It is stored in the manifest."""

    @abstractmethod
    def __init__(self, config: ComponentConfig, shapes: Shapes) -> None: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Item:
        """Return image number `index`. Raises dvae.data.images.DamagedImage, with its name, if it cannot be read."""


class StreamSource(Source):
    """Base class of sources that generate any number of samples.

    Samples are generated from a seed and a number when they are needed, so there are no shards.
    """

    classes: tuple[str, ...] = ()
    """Names of the classes. The label of a sample is an index into this tuple."""

    @abstractmethod
    def sample(self, seed: int, numbers: Sequence[int], label: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Generate the samples `numbers` of `seed`.

        Each sample is a pure function of (seed, number, label). If `label` is None, sample n has the class
        n mod len(classes).

        Returns:
            x (B, C, H, W), float32 in [-1, 1], and labels (B,), int64.
        """

    def __len__(self) -> int:
        raise self._refusal()

    def __getitem__(self, index: int) -> Item:
        raise self._refusal()

    def _refusal(self) -> UserError:
        return UserError(
            f"source {SOURCES.name_of(self)} generates its samples and has no shards: leave shards out of stages=[...]"
        )


SOURCES: Registry[Source] = Registry("source", __package__, Source)
