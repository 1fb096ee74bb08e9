"""Reading shards: any image of a split by its index."""

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
"""Bytes of the text beside an image, at most."""


@forbid_extra
@dataclass(frozen=True)
class _ImageInfo:
    """The text beside an image."""

    key: str
    labels: dict[str, str | int]


class Shards:
    """A split of a folder of shards, here or elsewhere, by index. Thread-safe.

    Images are read by offset and decoded; where all of them take no more than `cache_bytes`, each is kept in memory
    once it was decoded. A damaged image is replaced by the next good one, remembered in `damaged`, told to `report` in
    one line, and an error when there are more than `max_bad_fraction` of the split.
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
        """Images (B, C, H, W), uint8, at `indices` (B,). Raises MachineError naming a missing or too damaged file."""
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
            self._filled[index] = True  # after the pixels: another thread may be reading
        return self._cache[torch.from_numpy(wanted)]

    def info(self, index: int) -> dict[str, Any]:
        """{"key": name in the source, "labels": {attribute: value}} of one image.

        Raises MachineError naming the file if this text cannot be read.
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
        """As `info`. Raises DamagedImage, which says only what is wrong."""
        data = self.members.read(index, JSON, JSON_LIMIT)
        try:
            found: _ImageInfo = check(_ImageInfo, parse_json(data, "the text"), "the text")
        except DamagedFile as error:
            raise DamagedImage(str(error)) from None
        return {"key": found.key, "labels": found.labels}

    def classes(self, attribute: str, names: Sequence[str]) -> torch.Tensor:
        """The class of every image, (len,), int64: the number among `names` of its value of `attribute`.

        Reads the text beside every image. An image whose text is damaged is passed over like a damaged one. Raises
        UserError where the attribute is unknown, an image lacks it, or a value is not among `names`.
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
                found = "no such attribute" if value is None else f"the value {value!r}, which is no class"
                raise UserError(
                    f"data.label={attribute}: image {info['key']} has {found}: use an attribute that every image has"
                )
            classes[index] = numbers[str(value)]
        return classes

    def substituted(self, indices: np.ndarray) -> np.ndarray:
        """Indices of the images that `read` gave for `indices` (B,): others only where some are damaged."""
        if not self.damaged:
            return indices
        return np.array(
            [next(at for at in self._cyclic_from(int(index)) if at not in self.damaged) for index in indices]
        )

    def add_damaged(self, damaged: dict[int, str]) -> None:
        """Take images for damaged that others found to be.

        Raises MachineError if there are too many, or a number is not that of an image.
        """
        if foreign := [index for index in damaged if not 0 <= index < len(self)]:
            raise MachineError(
                f"image {foreign[0]} is recorded as damaged, but {self.folder} ({self.split}) has {len(self)} images: "
                "the record is of other shards, remove it"
            )
        with self._lock:
            self.damaged = damaged | self.damaged
        for index in damaged:
            self._check_damage_limit(index)

    def _cyclic_from(self, index: int) -> Iterator[int]:
        """All indices from `index` on, and around."""
        return ((index + step) % len(self) for step in range(len(self)))

    def _skip_damaged(self, index: int, why: str) -> None:
        """Remember a damaged image. Raises MachineError where there are too many."""
        with self._lock:
            new = index not in self.damaged
            self.damaged[index] = why
        if new and self._report:
            self._report(printable_line(f"damaged image {why}; {len(self.damaged)} of {len(self)}, passed over"))
        self._check_damage_limit(index)

    def _check_damage_limit(self, index: int) -> None:
        if len(self.damaged) > self._max_bad:
            raise MachineError(
                f"damaged image {self.damaged[index]}; {len(self.damaged)} of {len(self)} images so far, more than "
                f"are passed over: find all damage with python tools/shards.py verify {self.folder}"
            )

    def _next_intact(self, index: int) -> torch.Tensor:
        """The image at `index`, or the next good one."""
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
        """Key of a damaged image, or its place if even that cannot be read."""
        try:
            return str(self._read_info(index)["key"])[:200]
        except DamagedImage:
            return f"image {self.members.place(index)[1]}"
