"""Sets of images to be scored: files, an array, or a split of shards; read in order, a few at a time."""

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
"""Suffixes that torch-fidelity's command line reads."""
HASH_BATCH = 256
"""Images that are read together to be hashed."""


class ImageSet(ABC):
    """Images of one size, in a fixed order. Can be sent to another process."""

    place: str
    """Where they lie, for messages."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, start: int, stop: int) -> torch.Tensor:
        """Images start..stop - 1, (n, 3, H, W), uint8; gray ones three times over. Raises UserError for a damaged file,
        and where two are of unlike size."""

    def size(self) -> tuple[int, int]:
        """(height, width) of the first image."""
        height, width = self.read(0, 1).shape[2:]
        return height, width

    def sha256(self) -> str:
        """Hash of all pixels. Raises UserError where the images are of more than one size."""
        digest, size = hashlib.sha256(str((len(self), *self.size())).encode()), self.size()
        for start in range(0, len(self), HASH_BATCH):
            images = self.read(start, min(start + HASH_BATCH, len(self)))
            if tuple(images.shape[2:]) != size:
                raise UserError(f"{self.place}: images of unlike size, {_by(images.shape[2:])} and {_by(size)}")
            digest.update(images.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class ImageFileSet(ImageSet):
    """Files of a folder, or members of a zip or tar file."""

    place: str
    names: tuple[str, ...]
    offsets: tuple[tuple[int, int], ...] = ()
    """(begin, length) of each member of a tar file."""

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
                raise UserError(f"{self.place}: images of unlike size, {sizes}: bring them to one size")
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()

    def _images(self, wanted: range) -> list[np.ndarray]:
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
        """Pixels (H, W, 3) as torch-fidelity reads them: neither turned by an EXIF tag nor laid over white."""
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
    """A .npy file (n, H, W, C), uint8; or one of `shown` images that each row of it has side by side."""

    place: str
    shown: int = 1
    which: int = 0

    def __len__(self) -> int:
        return len(self._array())

    def _array(self) -> np.ndarray:
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
    """Images of a split of shards, by index."""

    place: str
    split: str
    indices: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, start: int, stop: int) -> torch.Tensor:
        return _shards(self.place, self.split).read(self.indices[start:stop]).expand(-1, 3, -1, -1).contiguous()


@cache
def _shards(place: str, split: str) -> Shards:
    return Shards(place, split, cache_bytes=0)


@dataclass(frozen=True, eq=False)
class TensorImages(ImageSet):
    """Images in memory, (N, 1 or 3, H, W), uint8."""

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
        """Hash of the shape and all pixels, gray ones once."""
        digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
        digest.update(self.images.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class ImageSubset(ImageSet):
    """Some images of a set, by index."""

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
    """The images at `place`, which the user gave as `word`: evenly spread, no more than `most` (0: all).

    Shards, a folder of PNG and JPEG files (not of its subfolders) in the order of their names, a zip or tar file of
    such, or a .npy file. Raises UserError where there are none.
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
    """The file that a link leads to; a link that leads round in circles itself."""
    try:
        return str(item.resolve())
    except RuntimeError:  # a loop
        return str(item.absolute())


def _archive(word: str, place: str) -> ImageFileSet:
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
    """The images among the names, in order. Raises UserError where there are none, or some would be passed over."""
    suffixes = {name: os.path.splitext(name)[1].lower() for name in names}
    if other := sorted(
        name for name, suffix in suffixes.items() if suffix in SUFFIXES and suffix not in READABLE_SUFFIXES
    ):
        raise UserError(f"{word}={place}: {os.path.basename(other[0])} would be passed over: save it as PNG")
    found = tuple(sorted(name for name, suffix in suffixes.items() if suffix in READABLE_SUFFIXES))
    if not found:
        raise UserError(f"{word}={place}: holds no PNG or JPEG file")
    return found


def require_same_size(a: ImageSet, b: ImageSet) -> None:
    """Raise UserError where two sets are of images of unlike size: their features would differ by the scaling alone."""
    if a.size() != b.size():
        raise UserError(
            f"{a.place} has images of {_by(a.size())}, {b.place} of {_by(b.size())}: bring both to one size first"
        )


def _by(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"
