"""Build shards in numbered jobs of `shard_size` consecutive images, and keep every finished job.

- A build that was killed resumes after its finished jobs.
- Several processes, on one or more machines, can each do a part of the jobs first (`build_part`).
- `build` does the missing jobs and publishes all shards as one folder.

Shards of a source (shard_jobs.py) and caches of latents (cache_build.py) differ only in what a job writes and how it
is checked.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from dvae.data.building.shard_request import job_images, job_numbers, jobs_of_part
from dvae.data.building.staging import StagingFolder, locked_staging, write_errors
from dvae.data.shards.manifest import Shard, refuse_bad_shards
from dvae.data.shards.verify import shard_problems
from dvae.errors import UserError
from dvae.utils.read import DamagedFile

ReportProgress = Callable[[int, int], None]
"""report(done, total), in images. The first call counts the images that earlier attempts have finished."""
R = TypeVar("R")
"""The result that a finished job records: a dataclass that can be stored as JSON."""


class NumberedJobs(ABC, Generic[R]):
    """All jobs of one request. A job's shards must not depend on the process that does it, or on other jobs."""

    what: ClassVar[str]
    """Name of the result, for messages."""
    record_file: ClassVar[str]
    """Name of the JSON file that describes the published folder."""
    result_type: ClassVar[type]
    """The class R."""
    discard_on_user_error: ClassVar[bool] = False
    """Whether `build` removes finished jobs after a UserError, because the request can never succeed."""

    def __init__(
        self,
        request: dict[str, Any],
        images: int,
        shard_size: int,
        members: int,
        report: ReportProgress | None,
    ) -> None:
        """Set up the jobs.

        Args:
            request: Everything that the shards' bytes depend on.
            images: Number of images of all jobs.
            shard_size: Number of images of each job. The last job may have fewer.
            members: Number of files of each sample.
            report: Called with the progress; None reports nothing.
        """
        self.request, self.images, self.shard_size, self.members = request, images, shard_size, members
        self._report = report or (lambda done, total: None)
        self._done = self._wanted = 0  # images

    @property
    def numbers(self) -> range:
        """The numbers of all jobs."""
        return job_numbers(self.images, self.shard_size)

    def images_of(self, number: int) -> range:
        """Return the indices of the images of a job."""
        return job_images(number, self.shard_size, self.images)

    @abstractmethod
    def is_published(self, out: Path) -> bool:
        """Return whether `out` holds this request's shards. Raises UserError if it holds something else."""

    @abstractmethod
    def shards_of(self, result: R) -> list[Shard]:
        """Return the shards that a finished job has written."""

    @abstractmethod
    def is_current(self, number: int, result: R) -> bool:
        """Return whether a finished job with intact shards still matches the current images."""

    @abstractmethod
    def resume(self, finished: Iterable[R]) -> None:
        """Load the results of finished jobs. Raises an error if too many of their images are damaged."""

    def prepare(self, missing: list[int]) -> AbstractContextManager[object]:
        """Return a context in which the jobs `missing` are written, in this order."""
        return nullcontext()

    @abstractmethod
    def write(self, number: int, folder: Path) -> R:
        """Write the shards of a job into `folder`, and call `advance` after each image."""

    @abstractmethod
    def record(self, results: list[R]) -> dict[str, Any]:
        """Return the content of `record_file`. Raises UserError if nothing can be published."""

    def advance(self) -> None:
        """Report that one more image is done."""
        self._done += 1
        self._report(self._done, self._wanted)

    def finished(self, staging: StagingFolder, numbers: Iterable[int]) -> dict[int, R]:
        """Return the results of the jobs in `numbers` that any process has finished and that are still valid."""
        journals = {number: staging.read_journal(number, self.request, self.result_type) for number in numbers}
        return {
            number: result
            for number, result in journals.items()
            if result is not None and self._is_intact(staging, number, result) and self.is_current(number, result)
        }

    def _is_intact(self, staging: StagingFolder, number: int, result: R) -> bool:
        shards = self.shards_of(result)
        try:
            refuse_bad_shards(staging.journal(number), shards, self.members)
        except DamagedFile:
            return False  # no build writes such values, so the journal is damaged
        return not any(shard_problems(staging.shards, shard, self.members) for shard in shards)

    def complete(self, staging: StagingFolder, finished: dict[int, R], numbers: range, prefix: str) -> list[R]:
        """Do all jobs in `numbers` except the `finished` ones, in work folders whose names begin with `prefix`.

        Returns the results of all jobs in `numbers`, in order.
        """
        self.resume(finished.values())
        self._done = sum(len(self.images_of(number)) for number in finished)
        self._wanted = sum(len(self.images_of(number)) for number in numbers)
        self._report(self._done, self._wanted)
        missing = [number for number in numbers if number not in finished]
        results = dict(finished)
        with self.prepare(missing):
            for number in missing:
                results[number] = self._do(staging, number, prefix)
        return [results[number] for number in numbers]

    def _do(self, staging: StagingFolder, number: int, prefix: str) -> R:
        """Write a job's shards in a work folder, move them to their places, then record that the job is finished."""
        with staging.work_folder(prefix) as folder:
            result = self.write(number, folder)
            noted: Any = result
            staging.finish_job(number, self.request, asdict(noted), folder, self.shards_of(result))
        return result


def build(jobs: NumberedJobs[Any], out: Path) -> bool:
    """Do the unfinished jobs, then publish the folder `out`, which appears complete or not at all.

    Unfinished work of a different request is removed. Returns True if this process published `out`. Returns False, and
    does nothing, if another process has published it in the meantime.

    Raises UserError if other processes work on `out`, and MachineError if writing fails. Finished jobs are kept, unless
    `jobs.discard_on_user_error` is set and the request itself fails.
    """
    with write_errors(out, jobs.what), locked_staging(out, shared=False) as staging:
        if jobs.is_published(out):
            staging.remove()
            return False
        staging.start(jobs.request)
        try:
            finished = jobs.finished(staging, jobs.numbers)
            staging.remove_others(finished, [shard for result in finished.values() for shard in jobs.shards_of(result)])
            record = jobs.record(jobs.complete(staging, finished, jobs.numbers, "work-all."))
        except UserError:
            if jobs.discard_on_user_error:
                staging.remove()
            raise
        staging.publish(jobs.record_file, record)
    return True


def build_part(jobs: NumberedJobs[Any], out: Path, part: int, parts: int) -> None:
    """Do the jobs of part number `part` (from 0) of `parts`, which a later `build` publishes.

    Nothing is done if another process has published `out` in the meantime.

    Raises UserError and MachineError for the same reasons as `build`. Also raises UserError if another process does
    this part, or if the staging folder holds parts of a different request. Finished jobs are kept after any error.
    """
    numbers = jobs_of_part(jobs.numbers, part, parts)
    with write_errors(out, jobs.what), locked_staging(out, shared=True) as staging:
        if jobs.is_published(out):
            staging.remove()
            return
        with staging.claim_part(part, parts) as prefix:
            staging.join(jobs.request)
            jobs.complete(staging, jobs.finished(staging, numbers), numbers, prefix)


def images_of_part(jobs: NumberedJobs[Any], part: int, parts: int) -> int:
    """Return the number of images of a part."""
    return sum(len(jobs.images_of(number)) for number in jobs_of_part(jobs.numbers, part, parts))
