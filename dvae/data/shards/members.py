"""Read any member of any sample in tar shards directly, by its byte offset."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dvae.data.images import DamagedImage
from dvae.data.shards.manifest import Shard
from dvae.data.shards.remote import RemoteShards
from dvae.data.shards.shard_index import read_index
from dvae.errors import MachineError
from dvae.utils.read import DamagedFile, require_regular

OPEN_FILES = 128
"""Maximum number of shard files to keep open."""
FETCHERS = 8
"""Number of remote index files to fetch at a time."""


class Members:
    """Reads the files of samples, which are indexed consecutively over all shards. Thread-safe.

    Args:
        folder: Folder of the shards.
        shards: The shards, in the order of the indices.
        again: How to rebuild the shards, for error messages.
        remote: Fetches each shard into `folder` when it is read; None if the shards are local.
        members: Number of files of each sample.

    Raises MachineError if a shard or its index is missing or damaged.
    """

    def __init__(
        self, folder: Path, shards: Sequence[Shard], again: str, remote: RemoteShards | None = None, members: int = 2
    ) -> None:
        self.folder, self._shards, self._again, self._remote = folder, shards, again, remote
        self._starts = np.cumsum([0, *(shard.count for shard in shards)])
        if remote:
            with ThreadPoolExecutor(FETCHERS) as pool:
                list(pool.map(remote.index, shards))
        self._rows = np.concatenate([self._load_index(shard, members) for shard in shards])
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def place(self, index: int) -> tuple[str, int]:
        """Return (name of the shard, number of the sample in the shard)."""
        number = self._shard_of(index)
        return self._shards[number].file, index - int(self._starts[number])

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def where(self, index: int, member: int) -> tuple[str, int, int]:
        """Return (name of the shard, offset, size) of member number `member` of sample `index`, in bytes."""
        offset, size = self._rows[index, 2 * member : 2 * member + 2]
        return self.place(index)[0], int(offset), int(size)

    def read(self, index: int, member: int, limit: int) -> bytes:
        """Read member number `member` of sample `index`.

        Raises DamagedImage if the member has more than `limit` bytes, or if the shard ends before the member does.
        Raises MachineError if the shard cannot be opened or read.
        """
        name, offset, size = self.where(index, member)
        if size > limit:
            raise DamagedImage(f"it has {size} bytes, more than {limit}")
        # Keep this reference until the read is done: another thread may evict the file, and `_File` then closes it.
        file = self._open(self._shards[self._shard_of(index)])
        try:
            data = os.pread(file.handle, size, offset)
        except OSError as error:
            raise MachineError(f"shard {self.folder / name} cannot be read: {error.strerror}") from None
        if len(data) != size:
            raise DamagedImage(f"the file ends {size - len(data)} bytes early")
        return data

    def _open(self, shard: Shard) -> _File:
        if self._remote:  # do not keep remote shards open: a removed file keeps its disk space until it is closed
            return _File(self._remote.open(shard))
        with self._lock:
            name = shard.file
            if name not in self._files:
                try:
                    require_regular(self.folder / name)
                    self._files[name] = _File(os.open(self.folder / name, os.O_RDONLY))
                except DamagedFile as error:
                    raise MachineError(f"shard {error}: restore it or {self._again}") from None
                except OSError as error:
                    raise MachineError(
                        f"shard {self.folder / name} cannot be opened ({error.strerror}): restore it or {self._again}"
                    ) from None
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)
            self._files.move_to_end(name)
            return self._files[name]

    def _load_index(self, shard: Shard, members: int) -> np.ndarray:
        """Return a shard's index, int64 of shape (count, 2 * members).

        A truncated shard is accepted, because the samples in the rest can be read. A shard that is too long is not.
        """
        try:
            if not self._remote and (size := require_regular(self.folder / shard.file).st_size) > shard.bytes:
                raise DamagedFile(self.folder / shard.file, f"has {size} bytes, not {shard.bytes}")
            return read_index(self.folder / shard.index, shard, members)
        except FileNotFoundError as error:
            raise MachineError(f"shard file {error.filename} is missing: restore it or {self._again}") from None
        except OSError as error:
            raise MachineError(
                f"shard file {error.filename} cannot be read ({error.strerror}): restore it or {self._again}"
            ) from None
        except DamagedFile as error:
            raise MachineError(
                f"shard file {error.path} is damaged (it {error.reason}): restore it or {self._again}"
            ) from None


class _File:
    """An open file that is closed with its last reference, since a thread may read a file that another evicts."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __del__(self) -> None:
        os.close(self.handle)
