"""Read the images of a split of shards by index."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dvae.data.images import DamagedImage, decode_png, png_limit
from dvae.data.labels import check_label
from dvae.data.shards.manifest import Manifest
from dvae.data.shards.members import Members
from dvae.data.shards.remote import RemoteShards
from dvae.errors import MachineError, UserError, fold, printable_line, suggest
from dvae.utils.read import DamagedFile, check, forbid_extra, parse_json

PNG, JSON = 0, 1  # members of a sample
JSON_LIMIT = 2**20
"""Maximum size in bytes of the JSON of an image."""


@forbid_extra
@dataclass(frozen=True)
class _ImageInfo:
    """The JSON that is stored with an image."""

    key: str
    labels: dict[str, str | int]


class Shards:
    """Reads the images of a split of local or remote shards by index. Thread-safe.

    A damaged image is replaced by the next intact one. It is recorded in `damaged` and reported in one line.

    Args:
        place: Folder of the shards, or remote shards.
        split: Name of the split, "train" or "heldout".
        cache_bytes: If all decoded images of the split fit in this many bytes, they are kept in memory after decoding.
        max_bad_fraction: Share of damaged images, in [0, 1], above which reading raises MachineError.
        report: Called with one line for each damaged image.

    Raises UserError if there are no shards at `place`, the split is unknown, or it has no images.
    """

    def __init__(
        self,
        place: str | Path | RemoteShards,
        split: str = "train",
        cache_bytes: int = 2 * 2**30,
        max_bad_fraction: float = 0.01,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.remote = place if isinstance(place, RemoteShards) else None
        self.folder, self.split = place.folder if isinstance(place, RemoteShards) else Path(place), split
        self.manifest = place.manifest() if isinstance(place, RemoteShards) else Manifest.load(place)
        if split not in self.manifest.splits:
            raise UserError(f"unknown split {split!r}: {suggest(split, self.manifest.splits)}")
        self.shards = self.manifest.splits[split]
        """The split's shards, in the order of the indices."""
        if not self.shards:
            raise UserError(f"shards at {place} have no image in {split!r}: build them with another held-out fraction")
        again = f"remove {self.folder}, to fetch them again" if self.remote else "build the shards again"
        self.members = Members(self.folder, self.shards, again, self.remote)
        self.shape = (self.manifest.channels, self.manifest.image_size, self.manifest.image_size)
        self.damaged: dict[int, str] = {}
        """Damaged images known so far: index -> file, key and reason."""
        self._report = report
        self._max_bad = max_bad_fraction * len(self)
        self._lock = threading.Lock()
        cached = len(self) * int(np.prod(self.shape)) <= cache_bytes
        self._cache = torch.empty((len(self), *self.shape), dtype=torch.uint8) if cached else None
        self._filled = np.zeros(len(self), dtype=bool)

    def __len__(self) -> int:
        return len(self.members)

    @property
    def labels(self) -> dict[str, list[str | int]]:
        """Every attribute of the images, with all the values it takes."""
        return self.manifest.labels

    def read(self, indices: Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """Read images (B, C, H, W), uint8, at `indices` (B,).

        Raises MachineError naming the file if a shard is missing or too many images are damaged.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if len(wanted) and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"images {wanted.min()} to {wanted.max()} of {len(self)}")
        if self._cache is None:
            out = torch.empty((len(wanted), *self.shape), dtype=torch.uint8)
            for row, index in enumerate(wanted):
                out[row] = self._next_intact(int(index))
            return out
        for index in wanted[~self._filled[wanted]]:
            self._cache[index] = self._next_intact(int(index))
            self._filled[index] = True  # set after the pixels are written, because another thread may read them at once
        return self._cache[torch.from_numpy(wanted)]

    def info(self, index: int) -> dict[str, Any]:
        """Return {"key": name in the source, "labels": {attribute: value}} of one image.

        Raises MachineError naming the file if the image's JSON cannot be read.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        try:
            return self._read_info(index)
        except DamagedImage as error:
            file, number = self.members.place(index)
            raise MachineError(
                f"shard {self.folder / file}: key and labels of image {number} cannot be read ({error}): find all "
                f"damage with python tools/shards.py verify {self.folder}"
            ) from None

    def _read_info(self, index: int) -> dict[str, Any]:
        """Return the same as `info`. Raises DamagedImage with the reason only, without the file."""
        data = self.members.read(index, JSON, JSON_LIMIT)
        try:
            found: _ImageInfo = check(_ImageInfo, parse_json(data, "the text"), "the text")
        except DamagedFile as error:
            raise DamagedImage(str(error)) from None
        return {"key": found.key, "labels": found.labels}

    def classes(self, attribute: str, names: Sequence[str]) -> torch.Tensor:
        """Return the class of every image, (len,), int64.

        The class is the position in `names` of the image's value of `attribute`. This reads the JSON of every image. An
        image with damaged JSON counts as a damaged image. Raises UserError if the attribute is unknown, an image lacks
        it, or a value is not in `names`.
        """
        check_label(self.labels, attribute, names)
        numbers = {name: number for number, name in enumerate(names)}
        classes = torch.zeros(len(self), dtype=torch.int64)
        for index in range(len(self)):
            try:
                info = self._read_info(index)
            except DamagedImage as error:
                file = self.members.place(index)[0]
                self._skip_damaged(index, f"{file}: labels of {self._name(index)} ({fold(error)})")
                continue
            value = info["labels"].get(attribute)
            if value is None or str(value) not in numbers:
                found = "no such attribute" if value is None else f"the value {value!r}, which is not a class"
                raise UserError(
                    f"data.label={attribute}: image {info['key']} has {found}: use an attribute that every image has"
                )
            classes[index] = numbers[str(value)]
        return classes

    def substituted(self, indices: np.ndarray) -> np.ndarray:
        """Return the indices of the images that `read` returned for `indices` (B,).

        They differ from `indices` only for damaged images, which `read` replaces.
        """
        if not self.damaged:
            return indices
        return np.array(
            [next(at for at in self._cyclic_from(int(index)) if at not in self.damaged) for index in indices]
        )

    def add_damaged(self, damaged: dict[int, str]) -> None:
        """Record images that another process found to be damaged: index -> file, key and reason.

        Raises MachineError if there are too many damaged images, or an index is out of range.
        """
        if foreign := [index for index in damaged if not 0 <= index < len(self)]:
            raise MachineError(
                f"image {foreign[0]} is recorded as damaged, but {self.folder} ({self.split}) has {len(self)} images: "
                "the record belongs to other shards, remove it"
            )
        with self._lock:
            self.damaged = damaged | self.damaged
        for index in damaged:
            self._check_damage_limit(index)

    def _cyclic_from(self, index: int) -> Iterator[int]:
        """Return all indices, starting at `index` and wrapping around at the end."""
        return ((index + step) % len(self) for step in range(len(self)))

    def _skip_damaged(self, index: int, why: str) -> None:
        """Record and report a damaged image. Raises MachineError if there are too many."""
        with self._lock:
            new = index not in self.damaged
            self.damaged[index] = why
        if new and self._report:
            self._report(printable_line(f"damaged image {why}; {len(self.damaged)} of {len(self)}, skipped"))
        self._check_damage_limit(index)

    def _check_damage_limit(self, index: int) -> None:
        if len(self.damaged) > self._max_bad:
            raise MachineError(
                f"damaged image {self.damaged[index]}; {len(self.damaged)} of {len(self)} images so far, more than "
                f"are allowed: find all damage with python tools/shards.py verify {self.folder}"
            )

    def _next_intact(self, index: int) -> torch.Tensor:
        """Return the image at `index`, or the next intact one. Raises MachineError if too many are damaged."""
        for at in self._cyclic_from(index):
            if at in self.damaged:
                self._check_damage_limit(at)
                continue
            try:
                return self._decode(at)
            except DamagedImage as error:
                self._skip_damaged(at, str(error))
        raise MachineError(f"no image of {self.folder} ({self.split}) can be read: build the shards again")

    def _decode(self, index: int) -> torch.Tensor:
        file, _ = self.members.place(index)
        try:
            return decode_png(self.members.read(index, PNG, png_limit(self.shape)), self.shape)
        except DamagedImage as error:
            raise DamagedImage(f"{file}:{self._name(index)} ({error})") from None

    def _name(self, index: int) -> str:
        """Return the key of a damaged image, or its number in the shard if the key cannot be read."""
        try:
            return str(self._read_info(index)["key"])[:200]
        except DamagedImage:
            return f"image {self.members.place(index)[1]}"
