"""Write tar files of samples, index them, and sync them to disk."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
from webdataset import TarWriter

from dvae.data.shards.manifest import Shard
from dvae.utils import atomic_files

MEMBERS = ("png", "json")
"""Files of each sample in a shard of images."""


class ShardWriter:
    """Writes one tar file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Pass a stream instead of a name: webdataset would interpret % or | in the path as a pattern or a pipe.
        self._stream = path.open("wb")
        self._tar = TarWriter(self._stream, encoder=False, mtime=0)

    def write(self, number: int, members: dict[str, bytes]) -> None:
        # The key is the sample's number and not its file name, because WebDataset splits names at the first dot.
        self._tar.write({"__key__": f"{number:09d}", **members})

    def close(self) -> None:
        self._tar.close()
        self._stream.close()


def seal(path: Path, members: tuple[str, ...] = MEMBERS) -> Shard:
    """Write the index of a finished tar file and sync both to disk. Returns the shard's manifest entry."""
    index = path.with_suffix(".npy")
    rows = index_of(path, members)
    with index.open("wb") as file:
        np.save(file, rows)
    atomic_files.sync(path)
    atomic_files.sync(index)
    return Shard(
        path.name, len(rows), path.stat().st_size, atomic_files.sha256(path), index.name, atomic_files.sha256(index)
    )


def index_of(path: Path, members: tuple[str, ...] = MEMBERS) -> np.ndarray:
    """Return offset and size in bytes of each sample's members, int64 (count, 2 * members), in the order of samples."""
    with tarfile.open(path, "r:") as tar:
        places = {member.name: (member.offset_data, member.size) for member in tar}
    keys = dict.fromkeys(name.partition(".")[0] for name in places)
    rows = [[number for member in members for number in places[f"{key}.{member}"]] for key in keys]
    return np.array(rows, dtype=np.int64).reshape(-1, 2 * len(members))
