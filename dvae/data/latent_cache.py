"""A cache of the trained encoder's outputs for every training image, in WebDataset shards.

A sample's key is the image's index in the training split ("000000012"). Its members depend on the kind of cache:

    posteriors        npy                  float32 (2, *latent): mean and logvar
    reconstructions   npy, 0.png, 1.png..  float32 (draws, *latent): z; and x_hat of each draw, rounded to 8 bits
"""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from dvae.data.images import DamagedImage, decode_png, encode_png, png_limit, png_shape, to_float
from dvae.data.shards.manifest import LIMIT, SIZES, Shard, refuse_bad_shards
from dvae.data.shards.members import Members
from dvae.errors import MachineError, UserError, fold
from dvae.utils import atomic_files
from dvae.utils.read import DamagedFile, forbid_extra, parse_npy, read_json

FILE = "cache.json"
REBUILD_HINT = "remove the folder and run the cache stage again"


@forbid_extra
@dataclass(frozen=True)
class CacheInfo:
    """Describes the contents of a cache and the encoder and images they were computed from."""

    images: int
    """Number of training images."""
    draws: int
    """Number of reconstructions of each image. 0 means that the cache holds posteriors."""
    latent: list[int]
    """Shape of z."""
    encoder_sha256: str
    """SHA-256 of the encoder's weights."""
    images_sha256: str
    """SHA-256 of the manifest of the image shards."""
    precision: str
    """Floating-point precision of the encoder."""
    seed: int
    """Seed of the draws."""

    def members(self) -> tuple[str, ...]:
        return ("npy", *(f"{number}.png" for number in range(self.draws)))

    def numbers(self) -> tuple[int, ...]:
        """Return the shape of each image's array: (draws, *latent), or (2, *latent) for posteriors."""
        return (self.draws or 2, *self.latent)


@forbid_extra
@dataclass(frozen=True)
class _CacheRecord(CacheInfo):
    """Contents of cache.json."""

    shards: list[Shard]


@dataclass(frozen=True)
class CachedSample:
    """The part of the cache that belongs to one image."""

    numbers: np.ndarray
    """float32 of shape (2, *latent), mean and logvar, or of shape (draws, *latent), z."""
    pictures: list[np.ndarray]
    """x_hat of each draw, uint8 of shape (H, W, C)."""

    def members(self) -> dict[str, bytes]:
        file = io.BytesIO()
        np.save(file, self.numbers)
        drawn = {f"{number}.png": encode_png(picture) for number, picture in enumerate(self.pictures)}
        return {"npy": file.getvalue(), **drawn}


class LatentCache:
    """Reads a finished cache by image index. Thread-safe.

    `shape` is (C, H, W) of the reconstructions; None takes the shape of the first one. Raises UserError if the cache
    does not match `info`. Raises MachineError if a file is missing or damaged.
    """

    def __init__(self, folder: Path, info: CacheInfo, shape: tuple[int, int, int] | None = None) -> None:
        shards = read_shard_list(folder, info)
        self.folder, self.info = folder, info
        self.members = Members(folder, shards, REBUILD_HINT, members=len(info.members()))
        for shard in shards:
            if atomic_files.sha256(folder / shard.file) != shard.sha256:
                raise MachineError(f"cache shard {folder / shard.file} is damaged: {REBUILD_HINT}")
        self._shape = shape or (self._shape_of_first() if info.draws else (0, 0, 0))

    def posteriors(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and logvar of the images `indices` (B,), both float32 of shape (B, *latent)."""
        both = torch.stack([self._numbers(int(index)) for index in indices])
        return both[:, 0], both[:, 1]

    def reconstructions(self, indices: torch.Tensor, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return z and x_hat of one draw of each image.

        Args:
            indices: Indices of the images, (B,).
            draws: Which draw to return for each image, (B,), from 0.

        Returns z (B, *latent) and x_hat (B, C, H, W) in [-1, 1].
        """
        chosen = list(zip(indices.tolist(), draws.tolist(), strict=True))
        z = torch.stack([self._numbers(index)[draw] for index, draw in chosen])
        return z, to_float(torch.stack([self._picture(index, draw) for index, draw in chosen]))

    def _shape_of_first(self) -> tuple[int, int, int]:
        try:
            shape = png_shape(self.members.read(0, 1, png_limit((3, SIZES[1], SIZES[1]))))
            if max(shape) > SIZES[1]:
                raise DamagedImage(f"a picture of shape {shape}")
        except DamagedImage as error:
            raise self._damage(0, error) from None
        return shape

    def _numbers(self, index: int) -> torch.Tensor:
        shape = self.info.numbers()
        try:
            found = parse_npy(self.members.read(index, 0, 4 * math.prod(shape) + 4096), f"numbers of image {index}")
            if found.dtype != np.float32 or found.shape != shape:
                raise DamagedImage(f"numbers of image {index} are {found.dtype} {found.shape}, not float32 {shape}")
        except (DamagedFile, DamagedImage) as error:
            raise self._damage(index, error) from None
        return torch.from_numpy(found)

    def _picture(self, index: int, draw: int) -> torch.Tensor:
        try:
            return decode_png(self.members.read(index, 1 + draw, png_limit(self._shape)), self._shape)
        except DamagedImage as error:
            raise self._damage(index, error) from None

    def _damage(self, index: int, error: Exception) -> MachineError:
        shard = self.folder / self.members.place(index)[0]
        return MachineError(f"cache shard {shard} is damaged ({error}): {REBUILD_HINT}")


def read_shard_list(folder: Path, info: CacheInfo) -> list[Shard]:
    """Return the list of shards of the cache in `folder`, without opening the shards.

    Raises UserError if the cache does not match `info` or is not finished. Raises MachineError if its record is
    damaged.
    """
    found = _load(folder)
    for name, wanted in asdict(info).items():
        if getattr(found, name) != wanted:
            raise UserError(
                f"cache.folder={folder} was made with {name} {str(getattr(found, name))[:80]}, this run has {wanted}: "
                "use another cache.folder"
            )
    try:
        refuse_bad_shards(folder / FILE, found.shards, len(info.members()))
        if sum(shard.count for shard in found.shards) != info.images:
            raise DamagedFile(folder / FILE, f"lists shards of other than {info.images} images")
    except DamagedFile as error:
        raise MachineError(f"{error}: {REBUILD_HINT}") from None
    return found.shards


def _load(folder: Path) -> _CacheRecord:
    path = folder / FILE
    try:
        return read_json(path, _CacheRecord, LIMIT)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"cache.folder={folder} holds no finished cache: run the cache stage") from None
    except DamagedFile as error:
        raise MachineError(f"{error}: {REBUILD_HINT}") from None
    except OSError as error:
        raise MachineError(f"{path} cannot be read ({fold(error)}): {REBUILD_HINT}") from None
