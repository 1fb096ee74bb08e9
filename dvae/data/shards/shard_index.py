"""The index of a shard, which holds the positions of its samples' members in the tar file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from dvae.data.shards.manifest import Shard
from dvae.utils.read import DamagedFile, parse_npy, read_bytes

HEADER = 4096
"""Maximum size in bytes of the NumPy header of an index file."""


def index_limit(shard: Shard, members: int = 2) -> int:
    """Return the maximum size in bytes of a shard's index file. `members` is the number of files of each sample."""
    return HEADER + 16 * members * shard.count


def read_index(path: Path, shard: Shard, members: int = 2) -> np.ndarray:
    """Read a shard's index: offset and size in bytes of each sample's members, int64 (count, 2 * members).

    Raises DamagedFile if the file does not match the hash in the manifest, has another shape or type, or points outside
    the shard. Raises OSError if it is missing.
    """
    data = read_bytes(path, index_limit(shard, members))
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise DamagedFile(path, "has other content than when it was written")
    rows = parse_npy(data, path)
    if rows.dtype != np.int64 or rows.shape != (shard.count, 2 * members):
        wanted = f"int64 {(shard.count, 2 * members)}"
        raise DamagedFile(path, f"holds {rows.dtype} {rows.shape}, not {wanted} as the manifest requires")
    offsets, sizes = rows[:, 0::2], rows[:, 1::2]
    if rows.min() < 0 or (offsets > shard.bytes - sizes).any():
        raise DamagedFile(path, f"points outside the {shard.bytes} bytes of its shard")
    return rows
