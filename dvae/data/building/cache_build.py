"""Build a cache of latents in numbered jobs (numbered_jobs.py).

Each job encodes `SHARD_SIZE` consecutive images and writes one shard.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from dvae.data.building import numbered_jobs, shard_request
from dvae.data.building.numbered_jobs import NumberedJobs, ReportProgress, images_of_part
from dvae.data.latent_cache import FILE, CachedSample, CacheInfo, LatentCache, read_shard_list
from dvae.data.shards.manifest import Shard
from dvae.data.shards.reader import Shards
from dvae.data.shards.tar_files import ShardWriter, seal
from dvae.errors import UserError
from dvae.utils.read import forbid_extra

SHARD_SIZE = 1000
"""Images of a job. A killed process loses at most this much work, and a part is a multiple of it."""


@dataclass(frozen=True)
class CacheSpec:
    """The contents of a cache, and how its samples are computed."""

    info: CacheInfo
    batch: int
    """Images that the encoder processes at a time. The last bits of a latent may depend on it."""
    images: Shards
    """The images to encode. The object records which of them are damaged."""
    samples: Callable[[int, int], Iterator[CachedSample]]
    """samples(start, stop) yields the samples of images start, ..., stop - 1, independent of earlier calls."""

    def request(self) -> dict[str, Any]:
        """Return everything that the shards' bytes depend on."""
        return asdict(self.info) | {"batch": self.batch, "shard_size": SHARD_SIZE}


@forbid_extra
@dataclass(frozen=True)
class CacheJobResult:
    """The result of a finished job."""

    shard: Shard
    damaged: dict[int, str]
    """Images known to be damaged when the job finished: index -> file, key and reason."""


class CacheJobs(NumberedJobs[CacheJobResult]):
    """All jobs that build a cache."""

    what: ClassVar[str] = "the cache"
    record_file: ClassVar[str] = FILE
    result_type: ClassVar[type] = CacheJobResult

    def __init__(self, spec: CacheSpec, report: ReportProgress) -> None:
        super().__init__(spec.request(), spec.info.images, SHARD_SIZE, len(spec.info.members()), report)
        self.spec = spec

    def is_published(self, out: Path) -> bool:
        return _is_cache(out) and bool(read_shard_list(out, self.spec.info))

    def shards_of(self, result: CacheJobResult) -> list[Shard]:
        return [result.shard]

    def is_current(self, number: int, result: CacheJobResult) -> bool:
        return all(0 <= index < len(self.spec.images) for index in result.damaged)

    def resume(self, finished: Iterable[CacheJobResult]) -> None:
        for result in finished:
            self.spec.images.add_damaged(result.damaged)

    def write(self, number: int, folder: Path) -> CacheJobResult:
        indices = self.images_of(number)
        writer = ShardWriter(folder / f"latents-{number:06d}.tar")
        try:
            for index, sample in zip(indices, self.spec.samples(indices.start, indices.stop), strict=True):
                writer.write(index, sample.members())
                self.advance()
        finally:  # close after errors too: an open tar file warns when it is garbage-collected
            writer.close()
        return CacheJobResult(seal(writer.path, self.spec.info.members()), dict(self.spec.images.damaged))

    def record(self, results: list[CacheJobResult]) -> dict[str, Any]:
        return asdict(self.spec.info) | {"shards": [asdict(result.shard) for result in results]}


def build_cache(folder: Path, spec: CacheSpec, progress: ReportProgress) -> None:
    """Build the cache in `folder`, which appears complete or not at all.

    Jobs that any process has finished are reused. Unfinished work of a different request is removed. After a build,
    `spec.images` records all damaged images that were found. If `folder` already holds the cache, its shards' hashes
    are checked and nothing is changed.

    Raises UserError if `folder` holds something else, or if other processes work on it. Raises MachineError if writing
    fails or the cache is damaged. Finished jobs are kept for the next attempt.
    """
    if _is_cache(folder) or not numbered_jobs.build(CacheJobs(spec, progress), folder):
        LatentCache(folder, spec.info)  # opening it raises if it is another cache or a damaged one


def build_cache_part(folder: Path, spec: CacheSpec, part: int, parts: int, progress: ReportProgress) -> int:
    """Do the jobs of part number `part` (from 0) of `parts`. `build_cache` publishes them.

    Parts may be done at the same time or one after another. If the cache is already complete, nothing is done and its
    shards are not checked. Returns the number of images of the part.

    Raises UserError and MachineError for the same reasons as `build_cache`. Also raises UserError if another process
    does this part, or if the staging folder holds parts of a different request. Finished jobs are kept after any error.
    """
    shard_request.check_part(part, parts)
    jobs = CacheJobs(spec, progress)
    if not jobs.is_published(folder):
        numbered_jobs.build_part(jobs, folder, part, parts)
    return images_of_part(jobs, part, parts)


def _is_cache(folder: Path) -> bool:
    """Return whether `folder` holds a cache: False if it is missing or empty.

    Raises UserError if it holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / FILE).exists():
        raise UserError(f"cache.folder={folder} exists and holds no cache: use another cache.folder or remove it")
    return True
