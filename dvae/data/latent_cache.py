"""A cache of latents: what the trained encoder makes of every training image, in WebDataset shards.

A sample's key is the image's index in the training split ("000000012"), and its members are

    posteriors        npy                  float32 (2, *latent): mean and logvar
    reconstructions   npy, 0.png, 1.png..  float32 (draws, *latent): z; and the x_hat of each, rounded to 8 bits
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
    """What a cache holds, and of what."""

    images: int
    """Training images."""
    draws: int
    """Reconstructions of each image; 0: posteriors."""
    latent: list[int]
    """Shape of z."""
    encoder_sha256: str
    """Of the encoder's weights."""
    images_sha256: str
    """Of the manifest of the images' shards."""
    precision: str
    """Arithmetic of the encoder."""
    seed: int
    """Of the draws."""

    def members(self) -> tuple[str, ...]:
        return ("npy", *(f"{number}.png" for number in range(self.draws)))

    def numbers(self) -> tuple[int, ...]:
        """Shape of the numbers of each image."""
        return (self.draws or 2, *self.latent)


@forbid_extra
@dataclass(frozen=True)
class _CacheRecord(CacheInfo):
    """cache.json."""

    shards: list[Shard]


@dataclass(frozen=True)
class CachedSample:
    """One image's share of the cache."""

    numbers: np.ndarray
    """float32: (2, *latent), mean and logvar; or (draws, *latent), z."""
    pictures: list[np.ndarray]
    """x_hat of each draw, (H, W, C) uint8."""

    def members(self) -> dict[str, bytes]:
        file = io.BytesIO()
        np.save(file, self.numbers)
        drawn = {f"{number}.png": encode_png(picture) for number, picture in enumerate(self.pictures)}
        return {"npy": file.getvalue(), **drawn}


class LatentCache:
    """A written cache, by index of the image. Thread-safe.

    Raises UserError if it is not that of `info`, MachineError if a file is missing or damaged. Pictures have the
    `shape` (C, H, W); None: that of the first one.
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
        """Mean and logvar of the images `indices` (B,), both (B, *latent), float32."""
        both = torch.stack([self._numbers(int(index)) for index in indices])
        return both[:, 0], both[:, 1]

    def reconstructions(self, indices: torch.Tensor, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """z (B, *latent) and x_hat (B, C, H, W) in [-1, 1] of draw number draws (B,) of the images `indices` (B,)."""
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
    """The shards of the cache in `folder`, not looked at.

    Raises UserError if it is not that of `info`, MachineError if its record is damaged.
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
