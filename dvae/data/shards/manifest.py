"""The manifest: what a folder of shards holds, and everything needed to trust it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dvae.errors import UserError, fold
from dvae.utils.read import DamagedFile, check, forbid_extra, parse_json, read_bytes

FILE = "manifest.json"
VERSION = 1
TRAIN, HELDOUT = "train", "heldout"
LIMIT = 32 * 2**20
"""Bytes of a manifest, at most: about 100,000 shards."""
VALUES = 2**21
"""Values in a manifest, at most: small ones would take a hundred times as much memory as their text."""
IMAGES = 2**25
"""Images of a folder of shards, at most: their indices then take 1 GiB of memory."""
LARGEST = 2**44
"""Bytes of a shard, at most."""
SIZES = (1, 4096)
"""Smallest and largest height and width of images."""
BLOCK = 512
"""A member of a tar file takes at least two blocks of so many bytes, its header and its content."""
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
"""File names that a manifest may hold. They become part of a path here, and of a command or an address elsewhere."""
DIGEST = re.compile(r"[0-9a-f]{64}")


@forbid_extra
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

    def problems(self, members: int = 2) -> Iterator[str]:
        """What is wrong with these fields, before any file is read; `members` are the files of each sample."""
        for name, suffix in ((self.file, ".tar"), (self.index, ".npy")):
            if not (PLAIN_NAME.fullmatch(name) and name.endswith(suffix)):
                yield f"names a file {name[:200]!r}, not a plain name that ends with {suffix}"
        for name, digest in (("sha256", self.sha256), ("index_sha256", self.index_sha256)):
            if not DIGEST.fullmatch(digest):
                yield f"{name} of {self.file[:200]} is {digest[:80]!r}, not 64 hexadecimal digits"
        if not 0 <= self.bytes <= LARGEST:
            yield f"{self.file[:200]} has {self.bytes} bytes"
        if not 1 <= self.count <= self.bytes // (2 * BLOCK * members):
            yield f"{self.file[:200]} has {self.count} samples in {self.bytes} bytes"


def refuse_bad_shards(path: object, shards: Iterable[Shard], members: int = 2) -> None:
    """Raise DamagedFile naming `path`, which lists these shards, for fields that no build writes."""
    names: set[str] = set()
    for shard in shards:
        for problem in shard.problems(members):
            raise DamagedFile(path, problem)
        for name in (shard.file, shard.index):
            if name in names:
                raise DamagedFile(path, f"names {name} twice")
            names.add(name)


@forbid_extra
@dataclass(frozen=True, kw_only=True)
class Manifest:
    """manifest.json of a folder of shards. It holds no times: the same build gives the same manifest."""

    version: int = VERSION
    """Of this format."""
    image_size: int
    """Height and width in pixels."""
    channels: int
    """1 (gray) or 3 (RGB)."""
    source: dict[str, Any]
    """The source's resolved config, with its name."""
    license: str
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
            text = read_bytes(path, LIMIT)
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"no shards at {folder}: build them with python tools/shards.py build source=... out={folder}"
            ) from None
        except DamagedFile as error:
            raise UserError(f"{error}: build the shards again") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read ({fold(error)}): build the shards again") from None
        return cls.parse(text, str(folder), image_size, channels)

    @classmethod
    def parse(cls, text: bytes, place: str, image_size: int | None = None, channels: int | None = None) -> Manifest:
        """The manifest of the shards at `place`, which may lie elsewhere; raises as `load` does."""
        path = f"{place}/{FILE}"
        try:
            if sum(text.count(mark) for mark in (b"{", b"[", b",")) > VALUES:
                raise DamagedFile(path, f"holds more than {VALUES} values")
            data = parse_json(text, path)
            found = data.get("version") if isinstance(data, dict) else None
            if found != VERSION:
                raise DamagedFile(path, f"has format version {str(found)[:80]}, this program reads {VERSION}")
            manifest: Manifest = check(cls, data, path)
            manifest._refuse(path)
        except DamagedFile as error:
            raise UserError(f"{error}: build the shards again") from None
        for name, wanted in (("image_size", image_size), ("channels", channels)):
            have = getattr(manifest, name)
            if wanted is not None and wanted != have:
                raise UserError(
                    f"shards at {place} have {name} {have}, not {wanted} as asked for: "
                    f"use {name}={have} or build others"
                )
        return manifest

    def _refuse(self, path: str) -> None:
        """Raise DamagedFile naming `path` for values that no build writes."""
        checks = (
            (SIZES[0] <= self.image_size <= SIZES[1], f"image_size is {self.image_size}, not {SIZES[0]} to {SIZES[1]}"),
            (self.channels in (1, 3), f"channels is {self.channels}, not 1 or 3"),
            (0 <= self.heldout_fraction <= 1, f"heldout_fraction is {self.heldout_fraction}"),
            (self.shard_size >= 1, f"shard_size is {self.shard_size}"),
            (self.damaged >= 0, f"damaged is {self.damaged}"),
            (
                set(self.splits) == {TRAIN, HELDOUT},
                f"splits are {str(sorted(self.splits))[:80]}, not heldout and train",
            ),
        )
        for sound, problem in checks:
            if not sound:
                raise DamagedFile(path, problem)
        refuse_bad_shards(path, (shard for shards in self.splits.values() for shard in shards))
        if (images := sum(map(self.count, self.splits))) > IMAGES:
            raise DamagedFile(path, f"lists {images} images, more than {IMAGES}")
