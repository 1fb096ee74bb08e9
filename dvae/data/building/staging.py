"""The hidden folder in which shards (of images, or of a cache) are made, and who may work in it: one build, or any
number of parts.

    .NAME.building/
      lock               held by whoever is at work: shared by parts, by a build alone
      lock-K-of-N        held by part K
      lock-request       held for a moment, by a part that looks whether it belongs to the others
      request.json       what is asked for
      unit-NNNNNN.json   journal of a finished unit, written after its shards
      work-*/            of the unit that a process has in hand
      shards/            shards of finished units; becomes NAME when they are complete

Locks save work and tell people what goes on; on a file system whose locks do not reach other machines nothing but work
is lost: processes write in folders of their own, and a shard takes its place in one rename, with the same bytes whoever
made it.
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
    """The journal of a unit."""

    request: str
    """Digest of the request that the unit is of."""
    unit: dict[str, Any]


@dataclass(frozen=True)
class Unfinished:
    """The hidden folder of the shards `out`."""

    out: Path
    path: Path

    @property
    def shards(self) -> Path:
        """Where finished shards lie."""
        return self.path / "shards"

    def journal(self, number: int) -> Path:
        """The note that unit `number` is finished."""
        return self.path / f"unit-{number:06d}.json"

    def take(self, request: dict[str, Any]) -> None:
        """For a build: make the folder that of `request`, whatever it was."""
        self.shards.mkdir(exist_ok=True)
        atomic_files.write_json(self.path / REQUEST, request)

    def join(self, request: dict[str, Any]) -> None:
        """For a part: work on `request`. Raises UserError where the folder is that of another."""
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
    def part(self, part: int, parts: int) -> Iterator[str]:
        """Be this part, for a while; gives the beginning of its working folders' names.

        Removes those that it left when it was killed. Raises UserError where another process is this part.
        """
        name = f"{part}-of-{parts}"
        refusal = UserError(f"another process is making part={part} parts={parts} of {self.out} now: wait for it")
        with atomic_files.locked(self.path / f"{LOCK}-{name}", refusal):
            for folder in self.path.glob(f"work-{name}.*"):
                shutil.rmtree(folder)
            yield f"work-{name}."

    @contextmanager
    def aside(self, work: str) -> Iterator[Path]:
        """A folder for the shards of a unit that is being written, whose name begins with `work`."""
        with tempfile.TemporaryDirectory(prefix=work, dir=self.path) as folder:
            yield Path(folder)

    def finish(
        self, number: int, request: dict[str, Any], unit: dict[str, Any], aside: Path, shards: Iterable[Shard]
    ) -> None:
        """Let the shards of unit `number` take their places, from `aside`, then note `unit` in its journal."""
        for shard in shards:
            for name in (shard.file, shard.index):
                (aside / name).replace(self.shards / name)
        atomic_files.sync(self.shards)
        atomic_files.write_json(self.journal(number), {"request": digest(request), "unit": unit})

    def noted(self, number: int, request: dict[str, Any], kind: Callable[..., T]) -> T | None:
        """What the journal of a unit of `request` holds, as `kind`; None if there is none, or none that makes sense."""
        path = self.journal(number)
        try:
            journal: _Journal = read_json(path, _Journal)
            return check(kind, journal.unit, path) if journal.request == digest(request) else None
        except (FileNotFoundError, DamagedFile):
            return None  # the unit is made again

    def clean(self, units: Iterable[int], shards: Iterable[Shard]) -> None:
        """For a build: remove all but the journals of these units, and these shards."""
        kept = {self.path / LOCK, self.path / REQUEST, self.shards, *map(self.journal, units)}
        kept |= {self.shards / name for shard in shards for name in (shard.file, shard.index)}
        for path in [*self.path.iterdir(), *self.shards.iterdir()]:
            if path not in kept:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def publish(self, file: str, content: dict[str, Any]) -> None:
        """Let the shards appear, with the JSON file that says what they are."""
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
def at_work(out: Path, shared: bool) -> Iterator[Unfinished]:
    """The hidden folder beside `out`, locked until the context or this process ends.

    `shared` is for parts, which may be there together; a build is there alone. Raises UserError where that cannot be.
    """
    out = out.absolute()
    folder = Unfinished(out, out.with_name(f".{out.name}.building"))
    with _locked(folder, shared):
        yield folder


@contextmanager
def faults(out: Path, what: str) -> Iterator[None]:
    """Faults of the machine while `what` is written to `out`, in one line."""
    try:
        yield
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{what} cannot be written to {out} ({error.strerror}): choose another folder") from None
    except OSError as error:
        raise MachineError(
            f"writing {what} to {out} failed: {fold(error)}; finished shards are kept, the same command again goes "
            "on after them"
        ) from None


def _locked(folder: Unfinished, shared: bool) -> IO[bytes]:
    """The lock file, locked; made with its folder where there is none."""
    path = folder.path / LOCK
    while True:
        folder.path.mkdir(parents=True, exist_ok=True)
        try:
            handle = atomic_files.open_own(
                path, os.O_RDWR | os.O_CREAT
            )  # NFS wants it writable for an exclusive lock and readable for a shared one
        except FileNotFoundError:  # the folder went meanwhile: its shards were published
            continue
        if not _try(handle, shared):
            raise _refusal(folder.out, handle, shared)
        if _is_at(handle, path):
            return handle
        handle.close()  # the lock of a folder that went meanwhile


def _try(handle: IO[bytes], shared: bool) -> bool:
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(handle: IO[bytes], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _refusal(out: Path, handle: IO[bytes], shared: bool) -> UserError:
    """Says who is at work: a lock that may be shared is held by parts."""
    with handle:
        if not shared and _try(handle, shared=True):
            return UserError(f"other processes are making parts of {out} now: wait until they have ended")
        return UserError(f"another process is building {out} now: wait for it or choose another folder")
