"""The manifest: what a folder of shards holds, and everything needed to trust it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dvae.errors import UserError, one_line

FILE = "manifest.json"
VERSION = 1
TRAIN, HELDOUT = "train", "heldout"


@dataclass(frozen=True)
class Shard:
    """One tar file and its index."""

    file: str
    """Name of the tar file, in the manifest's folder."""
    count: int
    """Images in it."""
    bytes: int
    """Size of the tar file."""
    sha256: str
    """Of the tar file."""
    index: str
    """Name of the index: NumPy int64 (count, 4), offset and size of the PNG, offset and size of the JSON."""
    index_sha256: str
    """Of the index file."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json of a folder of shards. It holds no times: the same build gives the same manifest."""

    version: int = VERSION
    """Of this format."""
    image_size: int
    """Height and width in pixels."""
    channels: int
    """1 (grey) or 3 (RGB)."""
    source: dict[str, Any]
    """The source's resolved config, with its name."""
    licence: str
    """Of the images, with the credit it asks for."""
    protocol: str
    """How the images came to their size."""
    heldout_fraction: float
    """Share of the images that was asked for as held out."""
    shard_size: int
    """Images of the source, in a row, of which a train and a held-out shard are made."""
    splits: dict[str, list[Shard]]
    """"train" and "heldout", disjoint. A number is missing where no image of those fell to the split."""
    labels: dict[str, list[str | int]]
    """Every attribute, with all the values it takes."""
    damaged: int = 0
    """Images of the source that could not be read and are not here."""
    damaged_first: list[str] = field(default_factory=list)
    """The first of them, with the reason."""

    def count(self, split: str) -> int:
        """Images in a split."""
        return sum(shard.count for shard in self.splits[split])

    def request(self) -> dict[str, Any]:
        """What was asked for: two builds of the same request and source give the same bytes."""
        keys = ("version", "image_size", "channels", "source", "heldout_fraction", "shard_size")
        return {key: getattr(self, key) for key in keys}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def load(cls, folder: str | Path, image_size: int | None = None, channels: int | None = None) -> Manifest:
        """The manifest in `folder`. Raises UserError where there is none, or images of another size or channels."""
        path = Path(folder) / FILE
        try:
            text = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"no shards at {folder}: build them with python tools/shards.py build source=... out={folder}"
            ) from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}): build the shards again") from None
        return cls.parse(text, str(folder), image_size, channels)

    @classmethod
    def parse(cls, text: bytes, place: str, image_size: int | None = None, channels: int | None = None) -> Manifest:
        """The manifest of the shards at `place`, which may lie elsewhere; raises as `load` does."""
        path = f"{place}/{FILE}"
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}): build the shards again") from None
        if not isinstance(data, dict) or data.get("version") != VERSION:
            found = data.get("version") if isinstance(data, dict) else None
            raise UserError(f"{path} has format version {found}, this program reads {VERSION}: build the shards again")
        try:
            splits = {split: [Shard(**shard) for shard in shards] for split, shards in data.pop("splits").items()}
            manifest = cls(splits=splits, **data)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({one_line(error)}): build the shards again") from None
        for name, wanted in (("image_size", image_size), ("channels", channels)):
            found = getattr(manifest, name)
            if wanted is not None and wanted != found:
                raise UserError(
                    f"shards at {place} have {name} {found}, not {wanted} as asked for: "
                    f"use {name}={found} or build others"
                )
        return manifest
