"""Base classes of sources of image files, in a folder or in a zip archive."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath

from omegaconf import MISSING
from PIL import Image

from dvae.data.image_tree import Tree, open_tree
from dvae.data.images import Crop, Resize, decode, fit, printable, protocol
from dvae.data.published_datasets import require_square
from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.sources.base import Item, Source


@dataclass(kw_only=True, slots=True)
class FilesConfig(ComponentConfig):
    """Fields that every source of image files has."""

    path: str = MISSING
    """Folder, which is read with its sub-folders, or zip archive, which is read without unpacking."""
    resize: Resize = Resize.lanczos
    """Filter for scaling to the requested image size."""


@dataclass(kw_only=True, slots=True)
class AnyFilesConfig(FilesConfig):
    """Fields of the sources of arbitrary images."""

    crop: Crop = Crop.center
    """center: crop the center square. none: keep the whole image, and squeeze it if it is not square."""
    license: str = Source.license
    """License of the images, with the credit that it requires. It is stored in the manifest."""


class ImageFileSource(Source):
    """Base class of sources of image files, in the order of their names.

    A subclass for a data set overrides `select` to choose its files, and `square` to crop them.
    """

    config: FilesConfig
    absent = "none of its images belong to this data set"
    """Message if `select` returns no files."""
    _crop = Crop.none
    """Crop that is applied to the result of `square`."""

    def __init__(self, config: FilesConfig, shapes: Shapes, opened: Callable[[str], Tree] = open_tree) -> None:
        self.config, self.shapes = config, shapes
        self.tree = opened(config.path)
        self.names = self.select(self.tree.names)
        if not self.names:
            raise UserError(f"source.path={config.path}: {self.absent}")

    def select(self, names: list[str]) -> list[str]:
        """Return the files that belong to the source. Raises UserError if the files do not form a valid data set."""
        return names

    def square(self, image: Image.Image, name: str) -> Image.Image:
        """Return the part of an image that is scaled. Raises DamagedImage if the image cannot be of the data set."""
        return require_square(image, name, self.shapes.image_size)

    def labels(self, index: int) -> dict[str, str | int]:
        """Return the known attributes of image number `index`: name -> value."""
        return {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Item:
        name = self.names[index]
        image = self.square(decode(self.tree.read(name), name), name)
        pixels = fit(image, self.shapes.image_size, self.shapes.channels, self._crop, name, self.config.resize)
        return Item(PurePath(printable(name)).as_posix(), pixels, self.labels(index))


class AnyImageFileSource(ImageFileSource):
    """All images below a root. If they are in several folders, the label "folder" is the folder of each image."""

    config: AnyFilesConfig

    def __init__(self, config: AnyFilesConfig, shapes: Shapes, opened: Callable[[str], Tree]) -> None:
        super().__init__(config, shapes, opened)
        self.license, self.protocol = config.license, protocol(config.crop, config.resize)
        self._crop = config.crop
        self._labeled = len({PurePath(name).parent for name in self.names}) > 1

    def square(self, image: Image.Image, name: str) -> Image.Image:
        return image  # the image may have any shape, because `fit` crops or squeezes it

    def labels(self, index: int) -> dict[str, str | int]:
        return {"folder": PurePath(printable(self.names[index])).parent.as_posix()} if self._labeled else {}
