"""The hidden staging folder in which shards (of images, or of a cache) are built, and the locks on it.

One build works in it alone, or any number of parts work in it together.

    .NAME.building/
      lock               held by every process that works here: shared by parts, exclusive for a build
      lock-K-of-N        held by part K
      lock-request       held for a moment, by a part that checks whether it belongs to the same request as the others
      request.json       what is asked for
      job-NNNNNN.json    journal of a finished job, written after its shards
      work-*/            shards of the job that a process is writing
      shards/            shards of finished jobs; becomes NAME when they are complete

Locks save work and tell people what goes on. On a file system whose locks do not reach other machines nothing but work
is lost: processes write in folders of their own, and a shard takes its place in one rename, with the same bytes from
every process.
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
    """Digest of the job's request."""
    job: dict[str, Any]
    """The job's result."""


@dataclass(frozen=True)
class StagingFolder:
    """The hidden folder in which the shards for `out` are built."""

    out: Path
    path: Path

    @property
    def shards(self) -> Path:
        """Where finished shards lie."""
        return self.path / "shards"

    def journal(self, number: int) -> Path:
        """The file which says that job `number` is finished."""
        return self.path / f"job-{number:06d}.json"

    def start(self, request: dict[str, Any]) -> None:
        """For a build: use the folder for `request`, whatever request it was used for."""
        self.shards.mkdir(exist_ok=True)
        atomic_files.write_json(self.path / REQUEST, request)

    def join(self, request: dict[str, Any]) -> None:
        """For a part: work on `request`. Raises UserError if the folder is used for another request."""
        self.shards.mkdir(exist_ok=True)
        path = self.path / REQUEST
        with atomic_files.open_own(self.path / f"{LOCK}-request", os.O_RDWR | os.O_CREAT) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)  # the part that comes first says what it is
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
        """Hold the lock of this part; yields the prefix of its work folders' names.

        Removes the work folders that a killed process left. Raises UserError if another process does this part.
        """
        name = f"{part}-of-{parts}"
        refusal = UserError(f"another process is making part={part} parts={parts} of {self.out} now: wait for it")
        with atomic_files.locked(self.path / f"{LOCK}-{name}", refusal):
            for folder in self.path.glob(f"work-{name}.*"):
                shutil.rmtree(folder)
            yield f"work-{name}."

    @contextmanager
    def work_folder(self, prefix: str) -> Iterator[Path]:
        """A folder for the shards of a job that is being written, whose name begins with `prefix`."""
        with tempfile.TemporaryDirectory(prefix=prefix, dir=self.path) as folder:
            yield Path(folder)

    def finish_job(
        self, number: int, request: dict[str, Any], result: dict[str, Any], folder: Path, shards: Iterable[Shard]
    ) -> None:
        """Move the shards of job `number` from the work folder to their places, then write its journal."""
        for shard in shards:
            for name in (shard.file, shard.index):
                (folder / name).replace(self.shards / name)
        atomic_files.sync(self.shards)
        atomic_files.write_json(self.journal(number), {"request": digest(request), "job": result})

    def read_journal(self, number: int, request: dict[str, Any], kind: Callable[..., T]) -> T | None:
        """The result of a finished job of `request`, as `kind`; None if there is no journal, or a damaged one."""
        path = self.journal(number)
        try:
            journal: _Journal = read_json(path, _Journal)
            return check(kind, journal.job, path) if journal.request == digest(request) else None
        except (FileNotFoundError, DamagedFile):
            return None  # the job is done again

    def remove_others(self, jobs: Iterable[int], shards: Iterable[Shard]) -> None:
        """For a build: remove all but the journals of these jobs, and these shards."""
        kept = {self.path / LOCK, self.path / REQUEST, self.shards, *map(self.journal, jobs)}
        kept |= {self.shards / name for shard in shards for name in (shard.file, shard.index)}
        for path in [*self.path.iterdir(), *self.shards.iterdir()]:
            if path not in kept:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def publish(self, file: str, content: dict[str, Any]) -> None:
        """Move the shards to `out`, with the JSON file that describes them."""
        atomic_files.write_json(self.shards / file, content)
        self.shards.chmod(0o755)
        atomic_files.sync(self.shards)
        self.shards.replace(self.out)
        atomic_files.sync(self.out.parent)
        self.remove()

    def remove(self) -> None:
        """Remove the folder with all that is in it; the lock goes last, so that nobody comes in before."""
        for path in self.path.glob("*"):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != LOCK:
                path.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


@contextmanager
def locked_staging(out: Path, shared: bool) -> Iterator[StagingFolder]:
    """The staging folder beside `out`, locked until the context or this process ends.

    A `shared` lock is for parts, which may work together; a build works alone. Raises UserError if others hold it.
    """
    out = out.absolute()
    folder = StagingFolder(out, out.with_name(f".{out.name}.building"))
    with _lock(folder, shared):
        yield folder


@contextmanager
def write_errors(out: Path, what: str) -> Iterator[None]:
    """Translate OSErrors while `what` is written to `out` into UserError or MachineError, in one line."""
    try:
        yield
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{what} cannot be written to {out} ({error.strerror}): choose another folder") from None
    except OSError as error:
        raise MachineError(
            f"writing {what} to {out} failed: {fold(error)}; finished shards are kept, the same command again goes "
            "on after them"
        ) from None


def _lock(folder: StagingFolder, shared: bool) -> IO[bytes]:
    """The lock file, locked; it and its folder are created if they do not exist."""
    path = folder.path / LOCK
    while True:
        folder.path.mkdir(parents=True, exist_ok=True)
        try:
            # NFS wants it writable for an exclusive lock and readable for a shared one
            handle = atomic_files.open_own(path, os.O_RDWR | os.O_CREAT)
        except FileNotFoundError:  # the folder went meanwhile: its shards were published
            continue
        if not _try_lock(handle, shared):
            raise _refusal(folder.out, handle, shared)
        if atomic_files.is_same_file(handle.fileno(), path):
            return handle
        handle.close()  # the lock of a folder that went meanwhile


def _try_lock(handle: IO[bytes], shared: bool) -> bool:
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _refusal(out: Path, handle: IO[bytes], shared: bool) -> UserError:
    """The error that says who holds the lock: one that can be shared is held by parts."""
    with handle:
        if not shared and _try_lock(handle, shared=True):
            return UserError(f"other processes are making parts of {out} now: wait until they have ended")
        return UserError(f"another process is building {out} now: wait for it or choose another folder")
