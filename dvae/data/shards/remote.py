"""Remote shards. Each file is fetched whole into a local folder, verified, and read from there.

Several processes may share the folder. They coordinate through its files only. `NAME` is complete and verified.
`.NAME.part` is being fetched and is locked by the process that fetches it. If the folder is full, the least recently
used shards are removed.
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
"""Maximum number of attempts to fetch a file."""
RETRY_PAUSE = 1.0
"""Seconds before the second attempt. The pause doubles before each further attempt."""
STALL_TIMEOUT = 60.0
"""Seconds without data after which an attempt fails."""
TOUCH_EVERY = 10.0
"""Minimum seconds between two updates of the modification time of a shard in use."""
CHUNK = 2**20
"""Bytes to read at a time."""


def is_remote(location: str) -> bool:
    """Return whether data.shards names a command (pipe:COMMAND) or a URL instead of a folder."""
    return location.startswith("pipe:") or "://" in location


class UntrustedLocation(str):
    """A command or URL from the settings in a run folder that the user's own command did not name."""


def locate_shards(shards: str, download_to: str, download_gib: float) -> Path | RemoteShards:
    """Return the local folder or the remote shards that data.shards names: a folder, a URL, or pipe:COMMAND.

    Files are fetched to `download_to`, and the fetched shards take at most `download_gib` GiB.
    Raises UserError for a command or URL that the user's own command did not name, because running it is not safe.
    """
    if isinstance(shards, UntrustedLocation):
        raise UserError(
            f"the run's images lie at {shards}, and a command or an address is used only if your own command "
            "names it: add shards=... (that place, if you trust it, or a folder with the same shards)"
        )
    return RemoteShards(shards, download_to, download_gib) if is_remote(shards) else Path(shards)


def file_url(location: str, name: str) -> str:
    """Return the URL that webdataset opens for the file `name` of `location`.

    `location` is a URL or a command (pipe:COMMAND) from the user. The name replaces %s in it. Without %s, the name is
    appended after a slash. Raises MachineError if `name` is not a PLAIN_NAME, because it could inject a command or
    point to another place.
    """
    if not PLAIN_NAME.fullmatch(name):
        raise MachineError(f"the manifest at {location} names a file {name[:200]!r}: build the shards again")
    url = location.replace("%s", name) if "%s" in location else f"{location.rstrip('/')}/{name}"
    if url.startswith("s3://") and "s3" not in gopen_schemes:  # webdataset registers s3 only for its own cache server
        return f"pipe:aws s3 cp {shlex.quote(url)} -"
    return url


def stream_bytes(url: str, limit: int, stop: threading.Event | None = None) -> Iterator[bytes]:
    """Yield the bytes at `url` in chunks.

    Raises OSError if the URL cannot be read, no data arrives for STALL_TIMEOUT seconds, more than `limit` bytes arrive,
    or `stop` is set. Raises UserError if the URL scheme is unknown.
    """
    try:
        if url.startswith("file:"):  # opening a named pipe would block until another process opens its other end
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
                raise OSError(f"it is larger than the {limit} bytes that it may have")
            yield data
        set_options(opened, timeout=STALL_TIMEOUT)
        opened.close()  # raises if the command failed
    except subprocess.TimeoutExpired:
        raise OSError("the command did not exit after its output ended") from None
    finally:
        if piped:
            piped.proc.kill()
        set_options(opened, ignore_errors=True)
        opened.close()


def _readable(handle: int, stop: threading.Event | None) -> bool:
    """Wait until data can be read. Raises OSError if none arrives for STALL_TIMEOUT seconds or `stop` is set."""
    poller = select.poll()
    poller.register(handle, select.POLLIN)
    deadline = time.monotonic() + STALL_TIMEOUT
    # Poll in short intervals, so that `stop` takes effect quickly.
    while not poller.poll(1000 * min(0.2, STALL_TIMEOUT)):
        if stop is not None and stop.is_set():
            raise OSError("stopped")
        if time.monotonic() > deadline:
            raise OSError(f"no data arrived for {STALL_TIMEOUT:g} seconds")
    return True


def read_manifest(location: str) -> bytes:
    """Return the bytes of the manifest at `location` without storing it. Raises UserError if it cannot be fetched."""
    url = file_url(location, FILE)
    try:
        return b"".join(stream_bytes(url, LIMIT))
    except OSError as error:
        raise UserError(
            f"no shards at data.shards={location} ({fold(error)}): check the address, or build shards with "
            "python tools/shards.py build and copy the folder there"
        ) from None


class RemoteShards:
    """The files of a remote folder of shards. Safe for several threads and processes."""

    def __init__(self, location: str, to: str | Path, gib: float) -> None:
        """Set up a local folder below `to` for the files of `location`. Its shards take at most `gib` GiB."""
        self.location = location
        # Remove secrets before hashing: someone who receives the folder could test guesses against the hash.
        self.folder = Path(to) / hashlib.sha256(scrub(location).encode()).hexdigest()[:12]
        self.limit = int(gib * 2**30)
        self._touched: dict[str, float] = {}

    def __str__(self) -> str:
        return self.location

    def manifest(self) -> Manifest:
        """Return the manifest. It is fetched only once, so that a resumed run uses the manifest it started with.

        Raises UserError if it is damaged, or if the largest shard exceeds the folder's limit.
        """
        while not (self.folder / FILE).exists():
            self._close(self._fetch(FILE, None, LIMIT))
        try:
            manifest = Manifest.load(self.folder)
        except UserError:
            (self.folder / FILE).unlink(missing_ok=True)  # fetch it again next time, in case it was repaired
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
        """Return the path of the shard's index, fetching it if it is missing or damaged.

        Index files do not count toward the folder's limit. Raises MachineError if it cannot be fetched.
        """
        path = self.folder / shard.index
        if path.exists() and sha256(path) != shard.index_sha256:
            path.unlink(missing_ok=True)
        while not path.exists():
            self._close(self._fetch(shard.index, shard.index_sha256, index_limit(shard)))
        return path

    def open(self, shard: Shard) -> int:
        """Return a file descriptor of the shard, fetching the shard if needed. The caller closes it.

        The descriptor stays valid if another process removes the file. Raises MachineError if the shard cannot be
        fetched.
        """
        while True:
            handle = self._open_local(shard)
            if handle is None:
                handle = self._fetch(shard.file, shard.sha256, shard.bytes, reserve=shard.bytes)
            if handle is not None:
                return handle  # None: another process has fetched the shard, or has failed to, so try again

    def prefetch(self, shard: Shard, stop: threading.Event) -> None:
        """Fetch the shard unless it is already local or another process is fetching it. Raises as `open` does."""
        handle = self._open_local(shard)
        if handle is None:
            handle = self._fetch(shard.file, shard.sha256, shard.bytes, shard.bytes, stop)
        self._close(handle)

    def _open_local(self, shard: Shard) -> int | None:
        """Return a file descriptor of the shard and mark the shard as in use, or None if it is not local and whole."""
        path = self.folder / shard.file
        try:
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without O_NONBLOCK, opening a named pipe would block
        except FileNotFoundError:
            return None
        if os.fstat(handle).st_size != shard.bytes:  # truncated, for example by a disk fault
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

        `digest` is the expected SHA-256; None is for the manifest, which is only checked to be JSON. Returns a file
        descriptor, or None if another process has fetched the file. If `stop` is given, this does not wait for another
        process that is fetching the file, and returns None.
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
            # While this process waited for the lock, its holder may have renamed or removed the file. The lock on the
            # old file then protects nothing.
            if not is_same_file(handle, part):
                os.close(handle)
                return None
        except BlockingIOError:
            os.close(handle)
            return None
        try:
            if path.exists():  # another process completed the file before this .part file was created
                part.unlink()
                os.close(handle)
                return None
            os.ftruncate(handle, 0)  # drop bytes that a killed process left
            self._reserve_space(handle, reserve, stop)
            self._download(name, digest, limit, handle, stop)
            os.fsync(handle)
            with self._space_lock():  # a process that sums up sizes at this moment could miss the file under both names
                part.rename(path)
        except BaseException:
            part.unlink(missing_ok=True)
            os.close(handle)
            raise
        return handle

    def _download(self, name: str, digest: str | None, limit: int, handle: int, stop: threading.Event | None) -> None:
        """Download into the file behind `handle`, with up to ATTEMPTS attempts.

        Raises MachineError if all attempts fail. Raises OSError at once for a fault of the local disk.
        """
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
            f"{name} cannot be fetched from data.shards={self.location} ({reason}; {ATTEMPTS} attempts): repair the "
            "connection or the shards there, then run the same command again"
        )

    def _reserve_space(self, handle: int, size: int, stop: threading.Event | None) -> None:
        """Make room for a shard of `size` bytes by removing the least recently used shards.

        The .part file is set to its full size at once, so that other processes count it. Raises OSError if `stop` is
        set.
        """
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
            # Other processes are fetching shards that fill the rest. When they finish, the shards can be removed.
            time.sleep(0.05)

    def _sizes(self) -> tuple[dict[Path, int], dict[Path, int]]:
        """Return the sizes in bytes of the complete shards, and of the shards that are being fetched.

        Partial files that killed processes left are removed.
        """
        whole, coming = {}, {}
        for path in self.folder.iterdir():
            try:
                if path.suffix == ".tar":
                    whole[path] = path.stat().st_size
                elif path.name.endswith(".tar.part") and not _remove_if_abandoned(path):
                    coming[path] = path.stat().st_size
            except FileNotFoundError:  # another process has just renamed or removed it
                continue
        return whole, coming

    @contextmanager
    def _space_lock(self) -> Iterator[None]:
        """Hold the lock for summing up sizes and removing or renaming shards. One thread or process holds it."""
        with open_own(self.folder / ".room", os.O_RDWR | os.O_CREAT) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _receive(url: str, digest: str | None, limit: int, handle: int, stop: threading.Event | None) -> None:
    """Overwrite the file behind `handle` with the bytes at `url`.

    Raises OSError if they do not match `digest`, or are not JSON when `digest` is None.
    """
    found, size = hashlib.sha256(), 0
    for data in stream_bytes(url, limit, stop):
        found.update(data)
        size += _write(handle, data, size)
    os.ftruncate(handle, size)
    if digest is None:
        try:
            parse_json(os.pread(handle, size, 0), FILE)
        except DamagedFile:
            raise OSError(f"the {size} bytes received are not a manifest") from None
    elif found.hexdigest() != digest:
        raise OSError(f"the {size} bytes received do not match the manifest's sha256")


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
    """Remove a .part file if a killed process left it. Return whether it was removed.

    A process locks a .part file while it fetches it, so a .part file that can be locked is abandoned. An empty file is
    kept because it takes no space, and the process that created it may be about to lock it.
    """
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
