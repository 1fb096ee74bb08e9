"""Read the input images of a command: a run's held-out images or a user's images.

A user's images must have the run's size and channels, or they are converted.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dvae.config.schema import ModelConfig
from dvae.data.image_tree import FolderTree, Tree, open_tree
from dvae.data.images import PIXELS, DamagedImage, decode, fit, is_image_name, open_image
from dvae.data.shards.manifest import FILE as MANIFEST
from dvae.data.shards.reader import Shards
from dvae.errors import UserError, fold
from dvae.inference.generation.generation_settings import ImageInputConfig
from dvae.inference.run_images import open_split
from dvae.utils import atomic_files
from dvae.utils.read import DamagedFile, map_npy

HELDOUT = "heldout"
DRAWN = "drawn"
GRAY_MODES = {"1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "F"}
"""Pillow's modes for images without color."""


class InputImages(ABC):
    """Input images, by number."""

    identity: str
    """Hash that identifies this set of images."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read_one(self, number: int) -> np.ndarray:
        """Return the pixels (H, W, C) uint8 of an image. Raises UserError if the image does not fit the run."""

    def check(self, numbers: Iterable[int]) -> None:  # noqa: B027 most have nothing to check
        """Raise UserError for the first image that does not fit the run. Called before anything is generated."""

    def label(self, number: int) -> str | None:
        """Return the class of an image, or None if it is not known."""
        return None

    def read(self, numbers: Iterable[int]) -> torch.Tensor:
        """Read the images with these numbers, (n, C, H, W) uint8."""
        return (
            torch.from_numpy(np.stack([self.read_one(number) for number in numbers])).permute(0, 3, 1, 2).contiguous()
        )


def open_input_images(settings: ImageInputConfig, config: ModelConfig) -> InputImages:
    """Open the images that `settings.images` names. Raises UserError if there are none."""
    place = Path(settings.images).expanduser()
    if settings.images == HELDOUT:
        return ShardInput(open_split(settings.run, config, HELDOUT, settings.shards), config)
    if (place / MANIFEST).exists():
        return ShardInput(open_split(settings.run, config, HELDOUT, settings.images), config)
    if place.suffix.lower() == ".npy":
        return ArrayInput(place, settings, config)
    return FileInput(place, settings, config)


class ShardInput(InputImages):
    """Input images from a split of shards."""

    def __init__(self, shards: Shards, config: ModelConfig) -> None:
        self.shards, self.config = shards, config
        self.identity = _hash([shard.sha256 for shard in shards.shards])

    def __len__(self) -> int:
        return len(self.shards)

    def read_one(self, number: int) -> np.ndarray:
        return self.shards.read([number])[0].permute(1, 2, 0).numpy()

    def label(self, number: int) -> str | None:
        value = self.shards.info(number)["labels"].get(self.config.label)
        return None if value is None or not self.config.classes else str(value)


class UserInput(InputImages):
    """A user's images. They must have the run's size and channels, or are converted if `resize` is set."""

    def __init__(self, settings: ImageInputConfig, config: ModelConfig) -> None:
        self.settings, self.config = settings, config
        self._crop, self._filter = config.crop, config.resize  # the same as for the run's own images

    def check_matches_run(self, size: tuple[int, int], gray: bool, name: str) -> None:
        """Raise UserError if an image of size (width, height) differs from the run's images and `resize` is not set."""
        if self.settings.resize:
            return
        own, where = self.config.image_size, f"images={self.settings.images}: {name}"
        if size != (own, own):
            raise UserError(
                f"{where} is {size[0]}x{size[1]}, the run's images are {own}x{own}: add resize=true to crop and scale"
            )
        if gray != (self.config.channels == 1):
            kinds = ("gray", "color") if gray else ("in color", "gray")
            raise UserError(f"{where} is {kinds[0]}, the run's images are {kinds[1]}: add resize=true to convert it")

    def fit_to_run(self, image: Image.Image, name: str) -> np.ndarray:
        """Return the pixels (H, W, C) of an image, cropped and scaled to the run's size like the run's own images."""
        config = self.config
        return fit(image, config.image_size, config.channels, self._crop, name, self._filter)


class ArrayInput(UserInput):
    """Images in a .npy file, (n, H, W, C) uint8, C = 1 or 3."""

    def __init__(self, place: Path, settings: ImageInputConfig, config: ModelConfig) -> None:
        super().__init__(settings, config)
        try:
            self._array = map_npy(place)
        except (DamagedFile, OSError) as error:
            reason = error.reason if isinstance(error, DamagedFile) else fold(error)
            raise UserError(f"images={settings.images}: not an array of images ({reason})") from None
        shape = self._array.shape
        if self._array.dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not len(self._array):
            raise UserError(f"images={settings.images}: {self._array.dtype} {shape}: use uint8 (n, H, W, 1 or 3)")
        if not 0 < shape[1] * shape[2] <= PIXELS:
            raise UserError(f"images={settings.images}: images of {shape[1]}x{shape[2]}: use 1 to {PIXELS} pixels")
        self.check_matches_run((shape[2], shape[1]), shape[3] == 1, "each")
        self.identity = atomic_files.sha256(place)

    def __len__(self) -> int:
        return len(self._array)

    def read_one(self, number: int) -> np.ndarray:
        pixels = self._array[number]
        return self.fit_to_run(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), f"image {number}")


class FileInput(UserInput):
    """The images of a folder or zip archive, in the order of their names, or one image file."""

    def __init__(self, place: Path, settings: ImageInputConfig, config: ModelConfig) -> None:
        super().__init__(settings, config)
        if place.is_file() and is_image_name(place.name):
            self.tree: Tree = FolderTree(str(place.parent), "images")
            self.names = [place.name]
        else:
            self.tree = open_tree(settings.images, "images")
            self.names = self.tree.names
        self.identity = self._identity(place)

    def _identity(self, place: Path) -> str:
        """Return the hash of an archive, or a hash of the names, sizes and times of files.

        The content of files is not hashed: to read all files would take as long as to generate images.
        """
        if not isinstance(self.tree, FolderTree):
            return atomic_files.sha256(place)
        try:
            stats = [((self.tree.root / name).stat(), name) for name in self.names]
        except OSError as error:
            raise UserError(f"images={self.settings.images}: {error.filename}: {error.strerror}") from None
        return _hash([(name, stat.st_size, stat.st_mtime_ns) for stat, name in stats])

    def __len__(self) -> int:
        return len(self.names)

    def check(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            name = self.names[number]
            try:
                # opening reads only the header
                image = open_image(self._bytes(number), f"{name} is not an image that can be read")
            except DamagedImage as error:
                raise UserError(f"images={self.settings.images}: {error}") from None
            self.check_matches_run(image.size, image.mode in GRAY_MODES, name)

    def read_one(self, number: int) -> np.ndarray:
        name = self.names[number]
        try:
            image = decode(self._bytes(number), name)
            self.check_matches_run(image.size, image.mode in GRAY_MODES, name)
            return self.fit_to_run(image, name)
        except DamagedImage as error:
            raise UserError(f"images={self.settings.images}: {error}") from None

    def _bytes(self, number: int) -> bytes:
        try:
            return self.tree.read(self.names[number])
        except DamagedImage as error:
            raise UserError(f"images={self.settings.images}: {error}") from None


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode("utf-8", "surrogateescape")).hexdigest()
