"""Sets of images to score: files, an array, or a split of shards. They are read in order, a few images at a time."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from dvae.data.archives import files_of, open_tar, open_zip, refuse_duplicates
from dvae.data.images import FILE_LIMIT, PIXELS, SUFFIXES, DamagedImage, open_image
from dvae.data.shards.manifest import FILE as MANIFEST
from dvae.data.shards.reader import Shards
from dvae.errors import UserError, fold
from dvae.utils.evenly_spaced import evenly_spaced
from dvae.utils.read import DamagedFile, map_npy, read_bytes, read_member

READABLE_SUFFIXES = (".png", ".jpg", ".jpeg")
"""File name endings that torch-fidelity's command line reads."""
HASH_BATCH = 256
"""Number of images that are read at a time to compute a hash."""


class ImageSet(ABC):
    """Images of the same size, in a fixed order. A set can be pickled, to send it to another process."""

    place: str
    """Where the images come from, for messages."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, start: int, stop: int) -> torch.Tensor:
        """Read the images start to stop - 1, (n, 3, H, W) uint8. The channel of a gray image is repeated.

        Raises UserError if a file is damaged, or if images have different sizes.
        """

    def size(self) -> tuple[int, int]:
        """(height, width) of the first image."""
        height, width = self.read(0, 1).shape[2:]
        return height, width

    def sha256(self) -> str:
        """Hash of all pixels. Raises UserError if the images have different sizes."""
        digest, size = hashlib.sha256(str((len(self), *self.size())).encode()), self.size()
        for start in range(0, len(self), HASH_BATCH):
            images = self.read(start, min(start + HASH_BATCH, len(self)))
            if tuple(images.shape[2:]) != size:
                raise UserError(f"{self.place}: images of different sizes, {_by(images.shape[2:])} and {_by(size)}")
            digest.update(images.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class ImageFileSet(ImageSet):
    """Image files in a folder, or members of a zip or tar file."""

    place: str
    """The folder or archive."""
    names: tuple[str, ...]
    """Paths of the files, or names of the members."""
    offsets: tuple[tuple[int, int], ...] = ()
    """Offset and length in bytes of each member of a tar file."""

    def __len__(self) -> int:
        return len(self.names)

    def read(self, start: int, stop: int) -> torch.Tensor:
        wanted = range(start, stop)
        try:
            images = self._images(wanted)
        except (DamagedFile, OSError, KeyError) as error:
            raise UserError(f"{self.place}: an image cannot be read ({fold(error)})") from None
        for i, image in zip(wanted, images, strict=True):
            if image.shape != images[0].shape:
                first, other = os.path.basename(self.names[start]), os.path.basename(self.names[i])
                sizes = f"{first} is {_by(images[0].shape)}, {other} is {_by(image.shape)}"
                raise UserError(f"{self.place}: images of different sizes, {sizes}: resize them to one size")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()

    def _images(self, wanted: range) -> list[np.ndarray]:
        """Read and decode the images with these numbers, each (H, W, 3) uint8."""
        if self.place.lower().endswith(".zip") and not Path(self.place).is_dir():
            with open_zip(self.place) as archive:
                members = [archive.getinfo(self.names[i]) for i in wanted]
                return [
                    self._decode(i, read_member(archive, member, FILE_LIMIT))
                    for i, member in zip(wanted, members, strict=True)
                ]
        if not self.offsets:
            return [self._decode(i, read_bytes(self.names[i], FILE_LIMIT)) for i in wanted]
        images = []
        with Path(self.place).open("rb") as file:
            for i in wanted:
                file.seek(self.offsets[i][0])
                images.append(self._decode(i, file.read(self.offsets[i][1])))
        return images

    def _decode(self, number: int, data: bytes) -> np.ndarray:
        """Decode an image to pixels (H, W, 3) uint8, in the way torch-fidelity does.

        EXIF rotation is not applied, and a transparent image is not composed onto white.
        """
        name = os.path.basename(self.names[number])
        try:
            image = open_image(data, f"{name} cannot be read")
        except DamagedImage as error:
            raise UserError(f"{self.place}: {error}") from None
        mode = image.mode
        try:
            pixels = np.asarray(image.convert("RGB"))
        except Exception as error:  # noqa: BLE001 damaged bytes make the decoders raise nearly anything
            raise UserError(f"{self.place}: {name} cannot be read ({fold(error)[:200]})") from None
        if mode.startswith("I") or mode == "F":
            raise UserError(f"{self.place}: {name} has more than 8 bits a channel: save it with 8")
        return pixels


@dataclass(frozen=True)
class ImageArray(ImageSet):
    """Images in a .npy file, (n, H, W, C) uint8.

    Each entry may show several images of the same width side by side. Then the set has one of them.
    """

    place: str
    """Path of the file."""
    shown: int = 1
    """Number of images side by side in each entry."""
    which: int = 0
    """Number of the one to use, from 0 at the left."""

    def __len__(self) -> int:
        return len(self._array())

    def _array(self) -> np.ndarray:
        """Map the file into memory. Raises UserError if it does not hold such an array."""
        try:
            array = map_npy(self.place)
        except (DamagedFile, OSError) as error:
            reason = error.reason if isinstance(error, DamagedFile) else fold(error)
            raise UserError(f"{self.place}: not an array of images ({reason})") from None
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3):
            raise UserError(f"{self.place}: {array.dtype} {array.shape}: want uint8 (n, H, W, 1 or 3)")
        if not 0 < array.shape[1] * array.shape[2] <= PIXELS:
            raise UserError(f"{self.place}: images of {_by(array.shape[1:3])}: use 1 to {PIXELS} pixels")
        return np.asarray(array)

    def read(self, start: int, stop: int) -> torch.Tensor:
        rows = self._array()[start:stop]
        width = rows.shape[2] // self.shown
        chosen = np.array(rows[:, :, self.which * width : (self.which + 1) * width])  # a copy: the file is read-only
        return torch.from_numpy(chosen).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()


@dataclass(frozen=True)
class ShardImages(ImageSet):
    """Images of a split of shards."""

    place: str
    """Folder of the shards."""
    split: str
    """Name of the split."""
    indices: tuple[int, ...]
    """Indices of the images in the split."""

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, start: int, stop: int) -> torch.Tensor:
        return _shards(self.place, self.split).read(self.indices[start:stop]).expand(-1, 3, -1, -1).contiguous()


@cache
def _shards(place: str, split: str) -> Shards:
    """Open a split once per process. Shards are not pickled with a set: each process opens its own."""
    return Shards(place, split, cache_bytes=0)


@dataclass(frozen=True, eq=False)
class TensorImages(ImageSet):
    """Images in memory, (N, 1 or 3, H, W) uint8."""

    images: torch.Tensor
    place: str = "images in memory"

    def __post_init__(self) -> None:
        shape, dtype = tuple(self.images.shape), self.images.dtype
        if dtype != torch.uint8 or len(shape) != 4 or shape[1] not in (1, 3) or not shape[0]:
            raise ValueError(f"images are {shape} {dtype}: want (N, 1 or 3, H, W) uint8, N >= 1")

    def __len__(self) -> int:
        return len(self.images)

    def read(self, start: int, stop: int) -> torch.Tensor:
        return self.images[start:stop].expand(-1, 3, -1, -1)

    def sha256(self) -> str:
        """Hash of the shape and of all pixels. The channel of gray images is not repeated for it."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        digest.update(self.images.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class ImageSubset(ImageSet):
    """Some images of another set, by index."""

    whole: ImageSet
    indices: tuple[int, ...]

    @property
    def place(self) -> str:  # type: ignore[override]
        return self.whole.place

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, start: int, stop: int) -> torch.Tensor:
        return torch.cat([self.whole.read(i, i + 1) for i in self.indices[start:stop]])


def open_image_set(word: str, place: str, split: str = "train", most: int = 0) -> ImageSet:
    """Open the images at `place`.

    Raises UserError if there are no images.

    Args:
        word: Name of the setting that holds `place`, for messages.
        place: Shards, a folder with PNG or JPEG files, a zip or tar file with such files, or a .npy file. Files are
            taken in the order of their names. Files in subfolders of a folder are not used.
        split: Split of the shards, if `place` is shards.
        most: Largest number of images. If there are more, the set has this many, evenly spaced (0: all).
    """
    path = Path(place)
    if not path.exists():
        raise UserError(f"{word}={place}: no such file or folder")
    if path.is_dir() and (path / MANIFEST).exists():
        count = len(_shards(place, split))
        return ShardImages(place, split, tuple(evenly_spaced(count, most or count).tolist()))
    if path.is_dir():
        found: ImageSet = ImageFileSet(place, _listed(word, place, [_resolved(item) for item in path.iterdir()]))
    elif path.suffix.lower() == ".npy":
        found = ImageArray(place)
    elif path.suffix.lower() in (".zip", ".tar"):
        found = _archive(word, place)
    else:
        raise UserError(f"{word}={place}: name shards, a folder of PNG or JPEG files, or a .zip, .tar or .npy file")
    if not len(found):
        raise UserError(f"{word}={place}: holds no image")
    return ImageSubset(found, tuple(evenly_spaced(len(found), most).tolist())) if 0 < most < len(found) else found


def _resolved(item: Path) -> str:
    """The absolute path of a file, with links resolved. A link that is part of a loop is not resolved."""
    try:
        return str(item.resolve())
    except RuntimeError:  # a loop of links; reading it fails later, with a message that names it
        return str(item.absolute())


def _archive(word: str, place: str) -> ImageFileSet:
    """List the images in a zip or tar file. Raises UserError if it cannot be read, or holds no image."""
    try:
        if place.lower().endswith(".zip"):
            with open_zip(place) as archive:
                found = archive.namelist()
            refuse_duplicates(place, found)
            return ImageFileSet(place, _listed(word, place, found))
        with open_tar(place) as tar:
            items = files_of(tar)
    except DamagedFile as error:
        raise UserError(f"{word}={place}: cannot be read ({error.reason})") from None
    except OSError as error:
        raise UserError(f"{word}={place}: cannot be read ({fold(error)})") from None
    names = _listed(word, place, list(items))
    for name in names:
        if items[name].size > FILE_LIMIT or items[name].issparse():
            raise UserError(
                f"{word}={place}: {name[:200]} has more than {FILE_LIMIT} bytes or is sparse: pack it again"
            )
    return ImageFileSet(place, names, tuple((items[name].offset_data, items[name].size) for name in names))


def _listed(word: str, place: str, names: list[str]) -> tuple[str, ...]:
    """The names of PNG and JPEG files among `names`, sorted.

    Raises UserError if there are none. Also raises it for image files of other formats, which would be skipped.
    """
    suffixes = {name: os.path.splitext(name)[1].lower() for name in names}
    if other := sorted(
        name for name, suffix in suffixes.items() if suffix in SUFFIXES and suffix not in READABLE_SUFFIXES
    ):
        raise UserError(f"{word}={place}: {os.path.basename(other[0])} would be skipped: save it as PNG")
    found = tuple(sorted(name for name, suffix in suffixes.items() if suffix in READABLE_SUFFIXES))
    if not found:
        raise UserError(f"{word}={place}: holds no PNG or JPEG file")
    return found


def require_same_size(a: ImageSet, b: ImageSet) -> None:
    """Raise UserError if the images of two sets have different sizes.

    Their features would differ because of the resizing alone.
    """
    if a.size() != b.size():
        raise UserError(
            f"{a.place} has images of {_by(a.size())}, {b.place} of {_by(b.size())}: resize them to one size first"
        )


def _by(size: Sequence[int]) -> str:
    """Height and width as text, such as 32x32."""
    return f"{size[0]}x{size[1]}"
