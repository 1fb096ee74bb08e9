"""Write files atomically, and lock files.

A file is written under a temporary name, fsynced, and then renamed. A crash thus leaves it either complete or absent.
"""

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
"""Seconds for which `locked` retries. A concurrent `is_locked` also holds the lock, but only for a moment."""


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Replace the file `path` in one rename.

    Args:
        path: The file. Its folder is created if it is missing.
        write: Called with a temporary path in the same folder; it writes the new content there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".tmp{path.suffix}", dir=path.parent)
    os.close(handle)
    aside = Path(name)
    try:
        write(aside)
        aside.chmod(0o644)  # mkstemp makes files that only their owner can read
        sync(aside)  # before the rename: after a crash, the new name must not point to an incomplete file
        aside.replace(path)
        sync(path.parent)  # makes the rename itself durable
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, in UTF-8 and without secrets (see dvae/utils/secrets.py)."""
    write_file(path, lambda aside: _put(aside, scrub(text)))


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as a JSON file atomically, without secrets."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as a hex string.

    Raises DamagedFile for a pipe, a device or a folder, and OSError if the file is missing.
    """
    require_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces `path` when the block ends without an error.

    The temporary folder is fsynced before the rename. If the block raises an error, the folder is removed. If a folder
    exists at `path`, it is first moved aside and removed last, so old and new content are never mixed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield aside
        aside.chmod(0o755)  # mkdtemp makes folders that only their owner can read
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
"""The temporary names that `write_file` and `new_folder` use."""


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files and folders that a killed process left in `folder`.

    Nothing is removed if `folder` is a symbolic link.
    """
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
    """Raise DamagedFile if a folder below `folder` is a symbolic link, because dvae would write through it.

    Entries of `folder` whose names are in `allowed` are not checked, nor is anything below them. `folder` itself may be
    a link.
    """
    for here, folders, _ in os.walk(folder):
        for name in list(folders):
            path = Path(here, name)
            if path.relative_to(folder).parts[0] in allowed:
                folders.remove(name)
            elif path.is_symlink():
                raise DamagedFile(path, "is a link to a folder; dvae would write through it: put a folder there")


def open_own(path: Path, flags: int) -> BinaryIO:
    """Open a file that only dvae writes, without changing its content.

    `flags` are flags of os.open. Symbolic links are not followed, because a link could lead to any file of the user.
    Raises OSError for a link, and DamagedFile for a pipe or a device, because reading it could block.
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
    """Return whether `path` still names the open file `handle`.

    Another process may have renamed or removed the file in the meantime.
    """
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def locked(path: Path, refusal: Exception) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` while the block runs.

    The kernel releases the lock when this process ends, even if it is killed. Raises `refusal` if another process
    holds the lock, and OSError or DamagedFile if the file cannot be opened.
    """
    deadline = time.monotonic() + LOOKED_AT
    with open_own(path, os.O_RDWR | os.O_CREAT) as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # held by another process, or by is_locked for a moment
                if time.monotonic() >= deadline:
                    raise refusal from None
                time.sleep(LOOKED_AT / 10)
        yield


def is_locked(path: Path) -> bool:
    """Return whether a process holds the lock file `path`.

    Raises OSError or DamagedFile if the file cannot be opened.
    """
    if not path.exists():
        return False
    with open_own(path, os.O_RDONLY) as handle:
        try:
            # A shared lock, so that two processes that only check do not report each other as holders.
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
