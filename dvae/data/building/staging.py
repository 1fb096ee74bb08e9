"""The hidden staging folder in which shards of images or of a cache are built, and its locks.

Either one build works in the folder alone, or any number of parts work in it together.

    .NAME.building/
      lock               held by every process that works here: shared by parts, exclusive for a build
      lock-K-of-N        held by part K
      lock-request       held briefly by a part while it checks that all parts belong to the same request
      request.json       the request
      job-NNNNNN.json    journal of a finished job, written after its shards
      work-*/            shards of the job that a process is writing
      shards/            shards of finished jobs; renamed to NAME when they are complete

The locks avoid duplicate work and make clear error messages possible. Correctness does not depend on them. If a file
system does not share locks between machines, some work is done twice, but no data is damaged: each process writes in
its own work folder, and moves a finished shard with one rename. All processes write the same bytes for a shard.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from dvae.data.building.shard_request import difference, digest
from dvae.data.shards.manifest import Shard
from dvae.errors import MachineError, UserError, fold
from dvae.utils import atomic_files
from dvae.utils.read import DamagedFile, check, forbid_extra, read_json

LOCK = "lock"
REQUEST = "request.json"
T = TypeVar("T")


@forbid_extra
@dataclass(frozen=True)
class _Journal:
    """The journal of a finished job."""

    request: str
    """SHA-256 of the job's request."""
    job: dict[str, Any]
    """The job's result, as JSON."""


@dataclass(frozen=True)
class StagingFolder:
    """The hidden folder in which the shards for `out` are built."""

    out: Path
    path: Path

    @property
    def shards(self) -> Path:
        """The folder of finished shards."""
        return self.path / "shards"

    def journal(self, number: int) -> Path:
        """Return the path of the file that records that job `number` is finished."""
        return self.path / f"job-{number:06d}.json"

    def start(self, request: dict[str, Any]) -> None:
        """Use the folder for `request`, even if it was used for a different request. Called by a build."""
        self.shards.mkdir(exist_ok=True)
        atomic_files.write_json(self.path / REQUEST, request)

    def join(self, request: dict[str, Any]) -> None:
        """Use the folder for `request` together with other parts. Called by a part.

        Raises UserError if the folder is used for a different request.
        """
        self.shards.mkdir(exist_ok=True)
        path = self.path / REQUEST
        with atomic_files.open_own(self.path / f"{LOCK}-request", os.O_RDWR | os.O_CREAT) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # exactly one part writes the request, and all others compare with it
            if not path.exists():
                atomic_files.write_json(path, request)
        try:
            there = read_json(path, dict[str, Any])
        except DamagedFile as error:
            raise UserError(f"{error}: remove {self.path}") from None
        if different := difference(there, request):
            raise UserError(
                f"parts of another request are being made for {self.out} ({different}): choose another folder or "
                f"remove {self.path}"
            )

    @contextmanager
    def claim_part(self, part: int, parts: int) -> Iterator[str]:
        """Hold the lock of this part in a context, and yield the prefix of its work folders' names.

        Removes work folders that a killed process left behind. Raises UserError if another process does this part.
        """
        name = f"{part}-of-{parts}"
        refusal = UserError(f"another process is making part={part} parts={parts} of {self.out} now: wait for it")
        with atomic_files.locked(self.path / f"{LOCK}-{name}", refusal):
            for folder in self.path.glob(f"work-{name}.*"):
                shutil.rmtree(folder)
            yield f"work-{name}."

    @contextmanager
    def work_folder(self, prefix: str) -> Iterator[Path]:
        """Create a temporary folder, with a name that begins with `prefix`, for the shards of the current job."""
        with tempfile.TemporaryDirectory(prefix=prefix, dir=self.path) as folder:
            yield Path(folder)

    def finish_job(
        self, number: int, request: dict[str, Any], result: dict[str, Any], folder: Path, shards: Iterable[Shard]
    ) -> None:
        """Move the shards of job `number` from the work folder to their places, then write its journal."""
        # The journal is written last, and after the sync: it must never name shards that a crash could still lose.
        for shard in shards:
            for name in (shard.file, shard.index):
                (folder / name).replace(self.shards / name)
        atomic_files.sync(self.shards)
        atomic_files.write_json(self.journal(number), {"request": digest(request), "job": result})

    def read_journal(self, number: int, request: dict[str, Any], kind: Callable[..., T]) -> T | None:
        """Return the result of a finished job of `request`, as `kind`.

        Returns None if the journal is missing, damaged, or belongs to a different request.
        """
        path = self.journal(number)
        try:
            journal: _Journal = read_json(path, _Journal)
            return check(kind, journal.job, path) if journal.request == digest(request) else None
        except (FileNotFoundError, DamagedFile):
            return None  # the job is done again

    def remove_others(self, jobs: Iterable[int], shards: Iterable[Shard]) -> None:
        """Remove everything except the lock, the request, the journals of `jobs`, and `shards`. Called by a build."""
        kept = {self.path / LOCK, self.path / REQUEST, self.shards, *map(self.journal, jobs)}
        kept |= {self.shards / name for shard in shards for name in (shard.file, shard.index)}
        for path in [*self.path.iterdir(), *self.shards.iterdir()]:
            if path not in kept:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def publish(self, file: str, content: dict[str, Any]) -> None:
        """Move the shards to `out`, together with the JSON file `file` that describes them."""
        atomic_files.write_json(self.shards / file, content)
        self.shards.chmod(0o755)
        atomic_files.sync(self.shards)
        self.shards.replace(self.out)
        atomic_files.sync(self.out.parent)
        self.remove()

    def remove(self) -> None:
        """Remove the folder and its contents. The lock is removed last, so that no process enters before."""
        for path in self.path.glob("*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def locked_staging(out: Path, shared: bool) -> Iterator[StagingFolder]:
    """Open the staging folder beside `out`, locked until the context or this process ends.

    Parts take a `shared` lock and may work together. A build takes an exclusive lock. Raises UserError if other
    processes hold a conflicting lock.
    """
    out = out.absolute()
    folder = StagingFolder(out, out.with_name(f".{out.name}.building"))
    with _lock(folder, shared):
        yield folder


@contextmanager
def write_errors(out: Path, what: str) -> Iterator[None]:
    """Translate OSErrors that occur while `what` is written to `out` into one-line UserErrors or MachineErrors."""
    try:
        yield
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{what} cannot be written to {out} ({error.strerror}): choose another folder") from None
    except OSError as error:
        raise MachineError(
            f"writing {what} to {out} failed: {fold(error)}; finished shards are kept, run the same command again "
            "to continue"
        ) from None


def _lock(folder: StagingFolder, shared: bool) -> IO[bytes]:
    """Lock the lock file and return it. It and its folder are created if they do not exist."""
    path = folder.path / LOCK
    while True:
        folder.path.mkdir(parents=True, exist_ok=True)
        try:
            # NFS requires a writable file for an exclusive lock and a readable file for a shared lock.
            handle = atomic_files.open_own(path, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # another process published the shards and removed the folder: create it again
            continue
        if not _try_lock(handle, shared):
            raise _refusal(folder.out, handle, shared)
        if atomic_files.is_same_file(handle.fileno(), path):
            return handle
        handle.close()  # this file was removed or replaced after it was opened, so its lock protects nothing


def _try_lock(handle: IO[bytes], shared: bool) -> bool:
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _refusal(out: Path, handle: IO[bytes], shared: bool) -> UserError:
    """Return the error that says who holds the lock.

    If a shared lock is available although an exclusive one is not, the holders are parts. Otherwise it is a build.
    """
    with handle:
        if not shared and _try_lock(handle, shared=True):
            return UserError(f"other processes are making parts of {out} now: wait until they have ended")
        return UserError(f"another process is building {out} now: wait for it or choose another folder")
