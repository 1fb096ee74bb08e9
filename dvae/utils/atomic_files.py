"""Files that are complete or absent: written aside, fsynced, then renamed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dvae.utils.read import DamagedFile, require_regular
from dvae.utils.secrets import scrub

LOOKED_AT = 0.2
"""Seconds that somebody who looks whether a lock is held may be in the way of who takes it, at the most."""


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Replace the file `path` by what `write(temporary path)` makes, in one rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".tmp{path.suffix}", dir=path.parent)
    os.close(handle)
    aside = Path(name)
    try:
        write(aside)
        aside.chmod(0o644)  # mkstemp makes it private
        sync(aside)
        aside.replace(path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, complete or absent, without secrets (see dvae/utils/secrets.py)."""
    write_file(path, lambda aside: _put(aside, scrub(text)))


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes. Raises DamagedFile for a pipe, a device or a folder; OSError if it is missing."""
    require_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; on a clean exit it is fsynced and takes the place of `path`, otherwise it is removed.

    A folder already at `path` is moved aside first and removed last, so its content is never mixed with the new.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield aside
        aside.chmod(0o755)
        for item in sorted(aside.rglob("*")):
            sync(item)
        sync(aside)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent))
            path.replace(old / path.name)
            aside.replace(path)
            shutil.rmtree(old)
        else:
            aside.replace(path)
        sync(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


LEFTOVER = re.compile(r"\..+\.[a-z0-9_]{8}\.(?:tmp|old)(?:\.\w+)?")
"""Names that `write_file` and `new_folder` give to what is not finished yet."""


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written in `folder`, which is no link."""
    if folder.is_symlink():
        return
    for item in folder.glob(".*"):
        if LEFTOVER.fullmatch(item.name) is None:
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()


def refuse_links(folder: Path, allowed: Collection[str] = ()) -> None:
    """Raise DamagedFile for a link in the place of a folder below `folder`: what is written there would land elsewhere.

    Links at or below one of the names `allowed` are passed over. `folder` itself may be a link.
    """
    for here, folders, _ in os.walk(folder):
        for name in list(folders):
            path = Path(here, name)
            if path.relative_to(folder).parts[0] in allowed:
                folders.remove(name)
            elif path.is_symlink():
                raise DamagedFile(path, "is a link to a folder; dvae would write through it: put a folder there")


def open_own(path: Path, flags: int) -> BinaryIO:
    """Open a file that only dvae writes; what it holds is not changed by that.

    A link is not followed, because it could lead to any file of the user's. Raises OSError for a link, and DamagedFile
    for a pipe or a device, which could block.
    """
    handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            require_regular(path)
        return os.fdopen(handle, "rb" if flags == os.O_RDONLY else "r+b")
    except BaseException:
        os.close(handle)
        raise


def is_same_file(handle: int, path: Path) -> bool:
    """Whether `path` still names the open file; another process may have renamed or removed it meanwhile."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def locked(path: Path, refusal: Exception) -> Iterator[None]:
    """Hold the lock file `path`; the hold ends with this process, however it ends.

    Raises `refusal` if another process holds it, OSError or DamagedFile if no file of that name can be opened.
    """
    deadline = time.monotonic() + LOOKED_AT
    with open_own(path, os.O_RDWR | os.O_CREAT) as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise refusal from None
                time.sleep(LOOKED_AT / 10)
        yield


def is_locked(path: Path) -> bool:
    """Whether a process holds the lock file `path`. Raises as `locked`."""
    if not path.exists():
        return False
    with open_own(path, os.O_RDONLY) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
