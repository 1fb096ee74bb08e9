"""The base of sources that are image files below a folder or in a zip archive."""

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
    """Fields of every source of image files."""

    path: str = MISSING
    """Folder, read with its sub-folders, or zip archive, read in place."""
    resize: Resize = Resize.lanczos
    """Filter that scales to the size asked for."""


@dataclass(kw_only=True, slots=True)
class AnyFilesConfig(FilesConfig):
    """Fields of the sources of images that nobody described."""

    crop: Crop = Crop.center
    """center: the middle square; none: the whole image, squeezed where it is not square."""
    license: str = Source.license
    """License of the images with the credit it asks for; kept in the manifest."""


class ImageFileSource(Source):
    """Image files in the order of their names. A data set says which of them are its own, and crops them."""

    config: FilesConfig
    absent = "none of its images belong to this data set"
    """What to say where `select` leaves nothing."""
    _crop = Crop.none
    """Of what `square` returns."""

    def __init__(self, config: FilesConfig, shapes: Shapes, opened: Callable[[str], Tree] = open_tree) -> None:
        self.config, self.shapes = config, shapes
        self.tree = opened(config.path)
        self.names = self.select(self.tree.names)
        if not self.names:
            raise UserError(f"source.path={config.path}: {self.absent}")

    def select(self, names: list[str]) -> list[str]:
        """The files that belong to the source. May raise UserError."""
        return names

    def square(self, image: Image.Image, name: str) -> Image.Image:
        """The part of an image that is scaled to a square. Raises DamagedImage where it is none of the data set."""
        return require_square(image, name, self.shapes.image_size)

    def labels(self, index: int) -> dict[str, str | int]:
        """Known attributes of image number `index`."""
        return {}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Item:
        name = self.names[index]
        image = self.square(decode(self.tree.read(name), name), name)
        pixels = fit(image, self.shapes.image_size, self.shapes.channels, self._crop, name, self.config.resize)
        return Item(PurePath(printable(name)).as_posix(), pixels, self.labels(index))


class AnyImageFileSource(ImageFileSource):
    """All images below a root; where they lie in several folders, the folder is the label "folder"."""

    config: AnyFilesConfig

    def __init__(self, config: AnyFilesConfig, shapes: Shapes, opened: Callable[[str], Tree]) -> None:
        super().__init__(config, shapes, opened)
        self.license, self.protocol = config.license, protocol(config.crop, config.resize)
        self._crop = config.crop
        self._labeled = len({PurePath(name).parent for name in self.names}) > 1

    def square(self, image: Image.Image, name: str) -> Image.Image:
        return image  # of any shape: `fit` crops or squeezes it

    def labels(self, index: int) -> dict[str, str | int]:
        return {"folder": PurePath(printable(self.names[index])).parent.as_posix()} if self._labeled else {}
