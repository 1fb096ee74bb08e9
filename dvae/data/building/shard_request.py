"""Check and compare requests for shards, and assign images to jobs and jobs to parts."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from dvae.data.shards.manifest import SIZES
from dvae.errors import UserError


def check_settings(size: int, channels: int, heldout: float, shard_size: int, workers: int, max_bad: float) -> None:
    """Raise UserError if a setting is outside its valid range."""
    if not SIZES[0] <= size <= SIZES[1]:
        raise UserError(f"size={size}: use {SIZES[0]} to {SIZES[1]} pixels")
    if channels not in (1, 3):
        raise UserError(f"channels={channels}: images have 1 or 3 channels")
    for name, fraction in (("heldout_fraction", heldout), ("max_bad_fraction", max_bad)):
        if not 0 <= fraction < 1:
            raise UserError(f"{name}={fraction}: use a fraction of at least 0 and below 1")
    if shard_size < 1:
        raise UserError(f"shard_size={shard_size}: use 1 or more")
    if workers < 1:
        raise UserError(f"workers={workers}: use 1 or more")


def check_part(part: int | None, parts: int) -> None:
    """Raise UserError unless `part` is in 0, ..., parts - 1. None is valid if there is only one part."""
    if parts < 1:
        raise UserError(f"parts={parts}: use 1 or more")
    if part is None:
        if parts > 1:
            raise UserError(f"parts={parts} without part: say which, part=0 to part={parts - 1}")
    elif not 0 <= part < parts:
        raise UserError(f"part={part}: use 0 to {parts - 1}, since parts={parts}")


def digest(request: dict[str, Any]) -> str:
    """Return the SHA-256 of a request. Different requests have different digests."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


def difference(there: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Describe the first field of `wanted` that has another value in `there`, or return an empty string.

    If a field such as the source is a mapping, the description names the inner field that differs.
    """
    for key, value in wanted.items():
        found = there.get(key)
        if found == value:
            continue
        if isinstance(found, dict) and isinstance(value, dict):
            name = next(name for name in {**found, **value} if found.get(name) != value.get(name))
            key, found, value = f"{key}.{name}", found.get(name), value.get(name)
        return f"{key} {str(found)[:200]}, not {value}"
    return ""


def job_numbers(images: int, shard_size: int) -> range:
    """Return the numbers of all jobs for `images` images."""
    return range(math.ceil(images / shard_size))


def job_images(number: int, shard_size: int, images: int) -> range:
    """Return the indices of the images of job `number`, out of `images` images."""
    return range(number * shard_size, min((number + 1) * shard_size, images))


def jobs_of_part(numbers: range, part: int, parts: int) -> range:
    """Return the consecutive jobs of one part. The sizes of two parts differ by at most one job.

    The jobs are consecutive because sources are read fastest in order. Even if jobs are small, parts rarely read the
    same row group of a Parquet file or the same block of an archive.
    """
    return numbers[part * len(numbers) // parts : (part + 1) * len(numbers) // parts]
