"""The files in tar shards, read by offset: any member of any sample, without going through what lies before it."""

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
FETCHERS = 8
"""Indices of shards elsewhere that are fetched at a time."""


class Members:
    """Members of the samples of consecutive shards, by index over all of them. Thread-safe.

    The shards lie in `folder`, or come there from `remote` as they are read. Each sample has `members` files. Raises
    MachineError if a shard or its index is missing or not what it was; `again` says how they are made.
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
        """(Name of the shard, number of the sample in it)."""
        number = self._shard_of(index)
        return self._shards[number].file, index - int(self._starts[number])

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def where(self, index: int, member: int) -> tuple[str, int, int]:
        """(Name of the shard, offset and size in bytes) of member number `member` of sample `index`."""
        offset, size = self._rows[index, 2 * member : 2 * member + 2]
        return self.place(index)[0], int(offset), int(size)

    def read(self, index: int, member: int, limit: int) -> bytes:
        """Member number `member` of sample `index`.

        Raises DamagedImage if the shard ends before it does, or it has more than `limit` bytes.
        """
        name, offset, size = self.where(index, member)
        if size > limit:
            raise DamagedImage(f"it has {size} bytes, more than {limit}")
        # held until it was read: another thread may evict it meanwhile
        file = self._open(self._shards[self._shard_of(index)])
        try:
            data = os.pread(file.handle, size, offset)
        except OSError as error:
            raise MachineError(f"shard {self.folder / name} cannot be read: {error.strerror}") from None
        if len(data) != size:
            raise DamagedImage(f"the file ends {size - len(data)} bytes early")
        return data

    def _open(self, shard: Shard) -> _File:
        if self._remote:  # opened anew each time: what is held open would keep its place on the disk when it is removed
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
        """A shard's index, (count, 2 * members).

        A shard may be shorter than it was, because it was cut: what is left of it can be read. It is never longer.
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
    """An open file, closed when the last reader lets go of it: a thread may still be reading what another evicts."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __del__(self) -> None:
        os.close(self.handle)
