"""The manifest, which describes a folder of shards and holds the hashes to verify it."""

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
"""Maximum size of a manifest in bytes, enough for about 100,000 shards."""
VALUES = 2**21
"""Maximum number of values in a manifest. Small parsed values take a hundred times as much memory as their text."""
IMAGES = 2**25
"""Maximum number of images in a folder of shards. Their indices then take 1 GiB of memory."""
LARGEST = 2**44
"""Maximum size of a shard in bytes."""
SIZES = (1, 4096)
"""Smallest and largest height and width of images in pixels."""
BLOCK = 512
"""Block size of a tar file in bytes. Each member takes at least two blocks, one for its header and one for content."""
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
"""Valid file names in a manifest. They are strict because names become part of paths, shell commands and URLs."""
DIGEST = re.compile(r"[0-9a-f]{64}")


@forbid_extra
@dataclass(frozen=True)
class Shard:
    """One tar file and its index."""

    file: str
    """Name of the tar file, in the manifest's folder."""
    count: int
    """Number of images in the tar file."""
    bytes: int
    """Size of the tar file in bytes."""
    sha256: str
    """SHA-256 of the tar file."""
    index: str
    """Name of the index: a NumPy int64 array (count, 4) with the offset and size of each PNG and of each JSON."""
    index_sha256: str
    """SHA-256 of the index file."""

    def problems(self, members: int = 2) -> Iterator[str]:
        """Yield a description of each invalid field, without reading any file.

        `members` is the number of files of each sample.
        """
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
    """Raise DamagedFile naming `path`, the file that lists these shards, if a field has a value that no build writes.

    `members` is the number of files of each sample.
    """
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
    """The manifest.json of a folder of shards. It holds no times, so that equal builds give equal manifests."""

    version: int = VERSION
    """Version of the manifest format."""
    image_size: int
    """Height and width of the images in pixels."""
    channels: int
    """1 (gray) or 3 (RGB)."""
    source: dict[str, Any]
    """The source's resolved config, including its name."""
    license: str
    """License of the images, including the credit that it asks for."""
    protocol: str
    """How the images were cropped and resized."""
    heldout_fraction: float
    """Requested share of held-out images, in [0, 1]."""
    shard_size: int
    """Number of consecutive source images that are written to one train shard and one held-out shard."""
    splits: dict[str, list[Shard]]
    """Shards of the disjoint splits "train" and "heldout". A shard number is missing if none of its images are in the
    split."""
    labels: dict[str, list[str | int]]
    """Every attribute, with all the values it takes."""
    damaged: int = 0
    """Number of source images that could not be read and are not in the shards."""
    damaged_first: list[str] = field(default_factory=list)
    """The first damaged images, with the reason."""

    def count(self, split: str) -> int:
        """Return the number of images in a split."""
        return sum(shard.count for shard in self.splits[split])

    def request(self) -> dict[str, Any]:
        """Return the request. Two builds of the same request and source give the same bytes."""
        keys = ("version", "image_size", "channels", "source", "heldout_fraction", "shard_size")
        return {key: getattr(self, key) for key in keys}

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def load(cls, folder: str | Path, image_size: int | None = None, channels: int | None = None) -> Manifest:
        """Load the manifest in `folder`.

        Raises UserError if it is missing or damaged, or if its images do not have the given `image_size` in pixels or
        number of `channels`. None accepts any.
        """
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
        """Parse the manifest `text` of the shards at `place`, which may be remote. Raises UserError as `load` does."""
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
                    f"shards at {place} have {name} {have}, not the requested {wanted}: "
                    f"use {name}={have} or build other shards"
                )
        return manifest

    def _refuse(self, path: str) -> None:
        """Raise DamagedFile naming `path` if a value is one that no build writes."""
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
