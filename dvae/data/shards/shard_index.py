"""The index of a shard: where the members of its samples lie in the tar file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from dvae.data.shards.manifest import Shard
from dvae.utils.read import DamagedFile, parse_npy, read_bytes

HEADER = 4096
"""Bytes of an index file besides its numbers, at most."""


def index_limit(shard: Shard, members: int = 2) -> int:
    """Bytes that the index file of a shard may have; `members` are the files of each sample."""
    return HEADER + 16 * members * shard.count


def read_index(path: Path, shard: Shard, members: int = 2) -> np.ndarray:
    """Offset and size in bytes of each sample's members, (count, 2 * members), int64, all within the shard's bytes.

    Raises DamagedFile for a file that is anything else, or not the one that the manifest names; OSError if missing.
    """
    data = read_bytes(path, index_limit(shard, members))
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise DamagedFile(path, "has other content than when it was written")
    rows = parse_npy(data, path)
    if rows.dtype != np.int64 or rows.shape != (shard.count, 2 * members):
        wanted = f"int64 {(shard.count, 2 * members)}"
        raise DamagedFile(path, f"holds {rows.dtype} {rows.shape}, not {wanted} as its shard has samples")
    offsets, sizes = rows[:, 0::2], rows[:, 1::2]
    if rows.min() < 0 or (offsets > shard.bytes - sizes).any():
        raise DamagedFile(path, f"points outside the {shard.bytes} bytes of its shard")
    return rows
