"""A cache of latents: what the trained encoder makes of every training image, in WebDataset shards.

A sample's key is the image's index in the training split ("000000012"), and its members are

    posteriors        npy                  float32 (2, *latent): mean and logvar
    reconstructions   npy, 0.png, 1.png..  float32 (draws, *latent): z; and the x_hat of each, rounded to 8 bits
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvae import files
from dvae.data.images import DamagedImage, decode_png, encode_png, to_float
from dvae.data.manifest import Shard
from dvae.data.members import Members
from dvae.errors import MachineError, UserError, one_line

FILE = "cache.json"
AGAIN = "remove the folder and run the cache stage again"


@dataclass(frozen=True)
class About:
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


@dataclass(frozen=True)
class Sample:
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


class Cache:
    """A written cache, by index of the image. Thread-safe.

    Raises UserError where it is not that of `about`, MachineError where a file is missing or damaged.
    """

    def __init__(self, folder: Path, about: About) -> None:
        shards = shards_of(folder, about)
        self.folder, self.about = folder, about
        self.members = Members(folder, shards, AGAIN)
        for shard in shards:
            if files.sha256(folder / shard.file) != shard.sha256:
                raise MachineError(f"cache shard {folder / shard.file} is damaged: {AGAIN}")

    def posteriors(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and logvar of the images `indices` (B,), both (B, *latent), float32."""
        both = torch.stack([self._numbers(int(index)) for index in indices])
        return both[:, 0], both[:, 1]

    def reconstructions(self, indices: torch.Tensor, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """z (B, *latent) and x_hat (B, C, H, W) in [-1, 1] of draw number draws (B,) of the images `indices` (B,)."""
        chosen = list(zip(indices.tolist(), draws.tolist(), strict=True))
        z = torch.stack([self._numbers(index)[draw] for index, draw in chosen])
        return z, to_float(torch.stack([self._picture(index, draw) for index, draw in chosen]))

    def _numbers(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.load(io.BytesIO(self._read(index, 0)), allow_pickle=False))

    def _picture(self, index: int, draw: int) -> torch.Tensor:
        return decode_png(self._read(index, 1 + draw))

    def _read(self, index: int, member: int) -> bytes:
        try:
            return self.members.read(index, member)
        except DamagedImage as error:
            raise MachineError(
                f"cache shard {self.folder / self.members.place(index)[0]} is damaged ({error}): {AGAIN}"
            ) from None


def shards_of(folder: Path, about: About) -> list[Shard]:
    """The shards of the cache in `folder`, not looked at. Raises UserError where it is not that of `about`."""
    found = _load(folder)
    for name, wanted in asdict(about).items():
        if found.get(name) != wanted:
            raise UserError(
                f"cache.folder={folder} was made with {name} {found.get(name)}, this run has {wanted}: "
                "use another cache.folder"
            )
    return [Shard(**row) for row in found["shards"]]


def _load(folder: Path) -> dict[str, Any]:
    path = folder / FILE
    if not path.exists():
        raise UserError(f"cache.folder={folder} holds no finished cache: run the cache stage")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MachineError(f"{path} cannot be read ({one_line(error)}): {AGAIN}") from None
