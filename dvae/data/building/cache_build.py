"""Write a cache of latents in numbered jobs (numbered_jobs.py) of `SHARD_SIZE` consecutive images, one shard each."""

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
"""Images of a job: what a killed process loses at the most, and the least that a part can be."""


@dataclass(frozen=True)
class CacheSpec:
    """What a cache holds, and how its samples are computed."""

    info: CacheInfo
    batch: int
    """Images that the encoder takes at a time: the last bits of a latent may depend on it."""
    images: Shards
    """The images that are encoded; it remembers which of them are damaged."""
    samples: Callable[[int, int], Iterator[CachedSample]]
    """samples(start, stop) yields those of the images start, ..., stop - 1; they must not depend on earlier calls."""

    def request(self) -> dict[str, Any]:
        """What the shards' bytes depend on."""
        return asdict(self.info) | {"batch": self.batch, "shard_size": SHARD_SIZE}


@forbid_extra
@dataclass(frozen=True)
class CacheJobResult:
    """What came of the images of a job."""

    shard: Shard
    damaged: dict[int, str]
    """Images known to be damaged when it was finished: index -> file, key and reason."""


class CacheJobs(NumberedJobs[CacheJobResult]):
    """All jobs for a cache."""

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
        finally:  # after an error too: an open tar would complain when it is collected
            writer.close()
        return CacheJobResult(seal(writer.path, self.spec.info.members()), dict(self.spec.images.damaged))

    def record(self, results: list[CacheJobResult]) -> dict[str, Any]:
        return asdict(self.spec.info) | {"shards": [asdict(result.shard) for result in results]}


def build_cache(folder: Path, spec: CacheSpec, progress: ReportProgress) -> None:
    """Write the cache into `folder`, which appears complete or not at all.

    Jobs that any process has finished are kept; what another request has left unfinished is removed. If `folder` holds
    the cache already, its shards' hashes are checked and it is left as it is. `spec.images` then knows all damaged
    images that were found.
    Raises UserError if `folder` holds something else, or other processes work on it; MachineError if writing fails, or
    the cache is damaged: finished jobs stay for the next attempt.
    """
    if _is_cache(folder) or not numbered_jobs.build(CacheJobs(spec, progress), folder):
        LatentCache(folder, spec.info)  # raises for another cache, or a damaged one


def build_cache_part(folder: Path, spec: CacheSpec, part: int, parts: int, progress: ReportProgress) -> int:
    """Do the jobs of part number `part` (0 is the first) of `parts`, for `build_cache` to publish.

    Parts may be done at the same time or one after another. Returns how many images the part has. Nothing is done if
    the cache is complete, and its shards are not checked then.
    Raises UserError and MachineError as `build_cache` does, and UserError if another process does this part or builds
    `folder`, or parts of another request are there; whatever is raised, finished jobs stay.
    """
    shard_request.check_part(part, parts)
    jobs = CacheJobs(spec, progress)
    if not jobs.is_published(folder):
        numbered_jobs.build_part(jobs, folder, part, parts)
    return images_of_part(jobs, part, parts)


def _is_cache(folder: Path) -> bool:
    """Whether `folder` holds a cache; False if nothing is there. Raises UserError if it holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / FILE).exists():
        raise UserError(f"cache.folder={folder} exists and holds no cache: use another cache.folder or remove it")
    return True
