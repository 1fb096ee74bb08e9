"""Shards that lie elsewhere: each file is fetched whole into a folder here, checked, and read from there.

Several processes may share the folder, by nothing but its files: `NAME` is whole and was checked, `.NAME.part` is on
its way and locked by who fetches it. Shards that were not wanted for the longest go where there is no room.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import select
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from webdataset.gopen import Pipe, gopen, gopen_schemes, set_options

from dvae.data.shards.manifest import FILE, LIMIT, PLAIN_NAME, Manifest, Shard
from dvae.data.shards.shard_index import index_limit
from dvae.errors import DISK_FAULTS, MachineError, UserError, fold
from dvae.utils.atomic_files import is_same_file, open_own, sha256
from dvae.utils.read import DamagedFile, parse_json, require_regular
from dvae.utils.secrets import scrub

ATTEMPTS = 5
"""How often a file is asked for."""
RETRY_PAUSE = 1.0
"""Seconds before the second attempt; twice as many before each one after."""
STALL_TIMEOUT = 60.0
"""Seconds without a byte after which an attempt is given up."""
TOUCH_EVERY = 10.0
"""Seconds between two notes that a shard is in use."""
CHUNK = 2**20


def is_remote(location: str) -> bool:
    """Whether data.shards names another place than a folder: pipe:COMMAND, or a URL."""
    return location.startswith("pipe:") or "://" in location


class UntrustedLocation(str):
    """A command or address that a run folder's settings hold, but that the user's own command did not name."""


def locate_shards(shards: str, download_to: str, download_gib: float) -> Path | RemoteShards:
    """The folder of shards, or the remote shards, that the settings data.shards, .download_to and .download_gib name.

    Raises UserError for a command or an address that the user's own command did not name: it could do anything.
    """
    if isinstance(shards, UntrustedLocation):
        raise UserError(
            f"the run's images lie at {shards}, and a command or an address is used only if your own command "
            "names it: add shards=... (that place, if you trust it, or a folder with the same shards)"
        )
    return RemoteShards(shards, download_to, download_gib) if is_remote(shards) else Path(shards)


def file_url(location: str, name: str) -> str:
    """What webdataset opens for the file `name` of `location`: %s stands for the name, else it comes after a slash.

    `location` is what the user named, and a command if it begins with pipe:. Raises MachineError for a `name` that is
    not plain: it could be a command, or lead elsewhere.
    """
    if not PLAIN_NAME.fullmatch(name):
        raise MachineError(f"the manifest at {location} names a file {name[:200]!r}: build the shards again")
    url = location.replace("%s", name) if "%s" in location else f"{location.rstrip('/')}/{name}"
    if url.startswith("s3://") and "s3" not in gopen_schemes:  # webdataset has it only for its own cache server
        return f"pipe:aws s3 cp {shlex.quote(url)} -"
    return url


def stream_bytes(url: str, limit: int, stop: threading.Event | None = None) -> Iterator[bytes]:
    """The bytes at `url`, in chunks.

    Raises OSError if they cannot be had, come to a standstill, are more than `limit`, or `stop` is set; UserError for
    an unknown scheme.
    """
    try:
        if url.startswith("file:"):  # webdataset would wait for the other end of a pipe
            require_regular(re.sub("^file://?", "", url))
        opened = gopen(url)
    except DamagedFile as error:
        raise OSError(f"it {error.reason}") from None
    except ValueError as error:
        raise UserError(f"data.shards: {fold(error)}: use pipe:, http://, https://, s3:// or gs://") from None
    piped = opened if isinstance(opened, Pipe) else None
    handle = (piped.stream if piped else opened).fileno()
    try:
        size = 0
        while _readable(handle, stop) and (data := os.read(handle, CHUNK)):
            size += len(data)
            if size > limit:
                raise OSError(f"more came than the {limit} bytes that it may have")
            yield data
        set_options(opened, timeout=STALL_TIMEOUT)
        opened.close()  # raises where the command failed
    except subprocess.TimeoutExpired:
        raise OSError("its end never came") from None
    finally:
        if piped:
            piped.proc.kill()
        set_options(opened, ignore_errors=True)
        opened.close()


def _readable(handle: int, stop: threading.Event | None) -> bool:
    """Wait until there is something to read. Raises OSError where nothing comes."""
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    deadline = time.monotonic() + STALL_TIMEOUT
    while not poller.poll(1000 * min(0.2, STALL_TIMEOUT)):
        if stop is not None and stop.is_set():
            raise OSError("stopped")
        if time.monotonic() > deadline:
            raise OSError(f"nothing came for {STALL_TIMEOUT:g} seconds")
    return True


def read_manifest(location: str) -> bytes:
    """The bytes of the manifest at `location`, kept nowhere. Raises UserError where it cannot be had."""
    url = file_url(location, FILE)
    try:
        return b"".join(stream_bytes(url, LIMIT))
    except OSError as error:
        raise UserError(
            f"no shards at data.shards={location} ({fold(error)}): is the address right? Build shards with "
            "python tools/shards.py build, and copy the folder there"
        ) from None


class RemoteShards:
    """The files of a folder of shards elsewhere. Safe for several threads and processes."""

    def __init__(self, location: str, to: str | Path, gib: float) -> None:
        """Files come to a folder of their own below `to`; its shards take no more than `gib` GiB."""
        self.location = location
        # the hash of a secret could be guessed at by whoever is given the folder
        self.folder = Path(to) / hashlib.sha256(scrub(location).encode()).hexdigest()[:12]
        self.limit = int(gib * 2**30)
        self._touched: dict[str, float] = {}

    def __str__(self) -> str:
        return self.location

    def manifest(self) -> Manifest:
        """The manifest, fetched once: a run goes on with the one that it began with."""
        while not (self.folder / FILE).exists():
            self._close(self._fetch(FILE, None, LIMIT))
        try:
            manifest = Manifest.load(self.folder)
        except UserError:
            (self.folder / FILE).unlink(missing_ok=True)  # so that one which was mended there is fetched the next time
            raise
        shards = [shard for split in manifest.splits.values() for shard in split]
        largest = max((shard.bytes for shard in shards), default=0)
        if largest > self.limit:
            raise UserError(
                f"data.download_gib={self.limit / 2**30:g}: the largest shard at {self.location} has "
                f"{largest / 2**30:.3g} GiB: use that or more"
            )
        return manifest

    def index(self, shard: Shard) -> Path:
        """The shard's index, fetched where it is not here or damaged. It does not count against the limit."""
        path = self.folder / shard.index
        if path.exists() and sha256(path) != shard.index_sha256:
            path.unlink(missing_ok=True)
        while not path.exists():
            self._close(self._fetch(shard.index, shard.index_sha256, index_limit(shard)))
        return path

    def open(self, shard: Shard) -> int:
        """A handle to read the shard by, fetched where it is not here; the caller closes it.

        What is read by it stays right though the file be removed meanwhile. Raises MachineError where it cannot be had.
        """
        while True:
            handle = self._open_local(shard)
            if handle is None:
                handle = self._fetch(shard.file, shard.sha256, shard.bytes, reserve=shard.bytes)
            if handle is not None:
                return handle  # else another has fetched it, or failed to

    def prefetch(self, shard: Shard, stop: threading.Event) -> None:
        """See to it that the shard is here, or on its way by another; raises as `open` does."""
        handle = self._open_local(shard)
        if handle is None:
            handle = self._fetch(shard.file, shard.sha256, shard.bytes, shard.bytes, stop)
        self._close(handle)

    def _open_local(self, shard: Shard) -> int | None:
        """A handle of the shard if it is here and whole, and a note that it is in use."""
        path = self.folder / shard.file
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its other end
        except FileNotFoundError:
            return None
        if os.fstat(handle).st_size != shard.bytes:  # cut by a fault of the disk
            os.close(handle)
            path.unlink(missing_ok=True)
            return None
        now = time.monotonic()
        if now - self._touched.get(shard.file, -TOUCH_EVERY) >= TOUCH_EVERY:
            self._touched[shard.file] = now
            os.utime(handle)
        return handle

    def _close(self, handle: int | None) -> None:
        if handle is not None:
            os.close(handle)

    def _fetch(
        self, name: str, digest: str | None, limit: int, reserve: int = 0, stop: threading.Event | None = None
    ) -> int | None:
        """Fetch a file of at most `limit` bytes, after making room for `reserve` bytes.

        Returns a handle of it, or None if another process has fetched it or (given `stop`) is about to.
        """
        path, part = self.folder / name, self.folder / f".{name}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.folder.is_symlink():
                raise UserError(f"data.download_to: {self.folder} is a link to another folder: remove it")
            handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise UserError(
                f"data.download_to: {self.folder} cannot be written ({error.strerror}): choose another folder"
            ) from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (fcntl.LOCK_NB if stop else 0))
            if not is_same_file(handle, part):  # who held it has renamed or removed it
                os.close(handle)
                return None
        except BlockingIOError:
            os.close(handle)
            return None
        try:
            if path.exists():  # published before this part was made
                part.unlink()
                os.close(handle)
                return None
            os.ftruncate(handle, 0)  # of a killed process
            self._reserve_space(handle, reserve, stop)
            self._download(name, digest, limit, handle, stop)
            os.fsync(handle)
            with self._space_lock():  # who counts just now would find it under neither name
                part.rename(path)
        except BaseException:
            part.unlink(missing_ok=True)
            os.close(handle)
            raise
        return handle

    def _download(self, name: str, digest: str | None, limit: int, handle: int, stop: threading.Event | None) -> None:
        """Fill the file behind `handle`, trying several times. Raises MachineError."""
        url, reason = file_url(self.location, name), ""
        for attempt in range(ATTEMPTS):
            if attempt:
                (stop or threading.Event()).wait(RETRY_PAUSE * 2 ** (attempt - 1))
            try:
                return _receive(url, digest, limit, handle, stop)
            except OSError as error:
                if error.errno in DISK_FAULTS:
                    raise OSError(error.errno, os.strerror(error.errno or 0), str(self.folder / name)) from None
                reason = fold(error)
            if stop is not None and stop.is_set():
                break
        raise MachineError(
            f"{name} cannot be fetched from data.shards={self.location} ({reason}; asked {ATTEMPTS} times): mend the "
            "connection or the shards there, then run the same command again"
        )

    def _reserve_space(self, handle: int, size: int, stop: threading.Event | None) -> None:
        """Make room for a shard: the oldest shards go, and the file grows to its size at once, so that it counts."""
        while True:
            with self._space_lock():
                whole, coming = self._sizes()
                used = sum(whole.values()) + sum(coming.values())
                for path in sorted(whole, key=_last_use):
                    if used + size <= self.limit:
                        break
                    path.unlink(missing_ok=True)
                    used -= whole[path]
                if used + size <= self.limit:
                    os.ftruncate(handle, size)
                    return
            if stop is not None and stop.is_set():
                raise OSError("stopped")
            time.sleep(0.05)  # the rest is on its way by others: it will be whole, or gone

    def _sizes(self) -> tuple[dict[Path, int], dict[Path, int]]:
        """Bytes of the whole shards, and of those on their way; what killed processes left is removed."""
        whole, coming = {}, {}
        for path in self.folder.iterdir():
            try:
                if path.suffix == ".tar":
                    whole[path] = path.stat().st_size
                elif path.name.endswith(".tar.part") and not _remove_if_abandoned(path):
                    coming[path] = path.stat().st_size
            except FileNotFoundError:  # another has just renamed or removed it
                continue
        return whole, coming

    @contextmanager
    def _space_lock(self) -> Iterator[None]:
        """One process or thread at a time counts and removes."""
        with open_own(self.folder / ".room", os.O_RDWR | os.O_CREAT) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _receive(url: str, digest: str | None, limit: int, handle: int, stop: threading.Event | None) -> None:
    """Write what is at `url` over the file behind `handle`. Raises OSError if it is not what it should be."""
    found, size = hashlib.sha256(), 0
    for data in stream_bytes(url, limit, stop):
        found.update(data)
        size += _write(handle, data, size)
    os.ftruncate(handle, size)
    if digest is None:
        try:
            parse_json(os.pread(handle, size, 0), FILE)
        except DamagedFile:
            raise OSError(f"what came is no manifest, {size} bytes") from None
    elif found.hexdigest() != digest:
        raise OSError(f"what came, {size} bytes, is not what the manifest names")


def _write(handle: int, data: bytes, at: int) -> int:
    done = 0
    while done < len(data):
        done += os.pwrite(handle, data[done:], at + done)
    return done


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _remove_if_abandoned(part: Path) -> bool:
    """Remove what a killed process left on its way; whether it was that."""
    handle = os.open(part, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        return False
    else:
        if is_same_file(handle, part) and os.fstat(handle).st_size:
            part.unlink()
            return True
        return False
    finally:
        os.close(handle)
