"""Read zip and tar archives from untrusted sources: list their members and read the members' bytes.

Nothing is unpacked to disk. Each size that an archive states is checked before memory is allocated for it.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from dvae.errors import fold
from dvae.utils.read import MIB, DamagedFile, archive_errors, require_regular

COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
"""Functions that open a compressed tar file, keyed by the file's first bytes."""
TAR_ERRORS = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, ValueError, OverflowError, RecursionError)
"""Exceptions that tarfile and the decompression modules raise for damaged archives, besides OSError."""
UNPACKED = 4 * 2**30
"""Maximum number of bytes to decompress from a compressed tar file.

A tar file has no table of contents, so reading a member decompresses all bytes before it.
"""


def open_zip(path: str | Path) -> zipfile.ZipFile:
    """Open a zip archive.

    Raises DamagedFile if `path` is not a zip archive, or is a pipe or a device. Raises OSError if it cannot be read.
    """
    require_regular(path)
    with archive_errors(path, "is not a readable zip archive"):
        return zipfile.ZipFile(path)


def refuse_duplicates(path: object, names: list[str]) -> None:
    """Raise DamagedFile if a name occurs twice, because programs differ in which of the two members they read."""
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise DamagedFile(path, f"holds {twice[:200]!r} twice: pack it again")


@contextmanager
def open_tar(path: str | Path, largest: int = MIB, compressed: bool = False) -> Iterator[tarfile.TarFile]:
    """Open a tar file in a context.

    Args:
        path: The tar file.
        largest: Maximum number of bytes in one read.
        compressed: Whether the file may be compressed with gzip, bzip2 or xz.

    Raises DamagedFile if `path` is not a tar archive, or is a pipe or a device. Raises OSError if it cannot be read.
    All TAR_ERRORS raised inside the context become DamagedFile, so only read the archive there.
    """
    require_regular(path)
    try:
        with Path(path).open("rb") as raw:
            begin = raw.read(6) if compressed else b""
            raw.seek(0)
            opener: Any = next((opener for magic, opener in COMPRESSED.items() if begin.startswith(magic)), None)
            bounded: Any = _Bounded(opener(raw), largest, UNPACKED) if opener else _Bounded(raw, largest, None)
            with tarfile.open(fileobj=bounded, mode="r:") as tar:
                yield tar
    except TAR_ERRORS as error:
        raise DamagedFile(path, f"is not a readable tar archive ({fold(error)[:200]})") from None


def files_of(tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """Return the regular files of a tar archive, by name. Raises tarfile.TarError, which `open_tar` translates."""
    found: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        if member.size < 0:  # tarfile would seek backward and loop forever
            raise tarfile.ReadError(f"{member.name[:200]!r} has {member.size} bytes")
        if member.isfile():
            found[member.name] = member
    return found


class _Bounded:
    """A stream that limits the size of each read and how far into the file it seeks.

    tarfile trusts the sizes in the archive when it reads long names and other headers. Without these limits, a crafted
    archive could make it allocate any amount of memory.
    """

    def __init__(self, stream: IO[bytes], largest: int, end: int | None) -> None:
        self._stream, self._largest, self._end = stream, largest, end

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._largest:
            raise tarfile.ReadError(f"a part of {size} bytes, more than {self._largest}")
        return self._stream.read(size)

    def seek(self, position: int, whence: int = 0) -> int:
        if whence or position < 0 or (self._end is not None and position > self._end):
            raise tarfile.ReadError(f"a part at byte {position}")
        return self._stream.seek(position)

    def tell(self) -> int:
        return self._stream.tell()
