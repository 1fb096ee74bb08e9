"""Zip and tar archives that a stranger may have written: what is in them, and their members' bytes.

Nothing is unpacked to the disk. A size that an archive states is checked before memory is taken for it.
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
"""What opens a compressed tar file, by its first bytes."""
TAR_ERRORS = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, ValueError, OverflowError, RecursionError)
"""What tarfile and the modules that decompress raise for damaged archives, besides OSError."""
UNPACKED = 4 * 2**30
"""Bytes of a compressed tar file that are decompressed at most: members are found by going through what lies before."""


def open_zip(path: str | Path) -> zipfile.ZipFile:
    """Open a zip archive. Raises DamagedFile if it is none, or a pipe or a device; OSError if it cannot be read."""
    require_regular(path)
    with archive_errors(path, "is not a readable zip archive"):
        return zipfile.ZipFile(path)


def refuse_duplicates(path: object, names: list[str]) -> None:
    """Raise DamagedFile if a name is there twice: programs differ in which of the two they read."""
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise DamagedFile(path, f"holds {twice[:200]!r} twice: pack it again")


@contextmanager
def open_tar(path: str | Path, largest: int = MIB, compressed: bool = False) -> Iterator[tarfile.TarFile]:
    """Open a tar file, which may be `compressed`; no more than `largest` bytes of it are read at a time.

    Raises DamagedFile if it is none, or a pipe or a device; OSError if it cannot be read. Errors of this kind that are
    raised in the context are translated too, so let it only read the archive.
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
    """The regular files of a tar archive, by name. Raises tarfile.TarError, which `open_tar` translates."""
    found: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        if member.size < 0:  # tarfile would go back in the file, and never come to its end
            raise tarfile.ReadError(f"{member.name[:200]!r} has {member.size} bytes")
        if member.isfile():
            found[member.name] = member
    return found


class _Bounded:
    """A stream that refuses to read much at a time, or far into the file.

    tarfile reads the long names and other headers of members by the sizes that stand in the archive.
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
