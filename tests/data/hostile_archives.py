"""Zip and tar archives and arrays of images that a stranger could send."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hostile_files import BOMB, FIRST, MARK, PIXELS, Executes, npy

from dvae.data.images import encode_png


def zipped(folder: Path, *members: tuple[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(folder / "x.zip", "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return folder / "x.zip"


def sound_zip(folder: Path) -> Path:
    return zipped(folder, *[(f"{number}.png", encode_png(pixels)) for number, pixels in enumerate(PIXELS)])


def zip_with(folder: Path, data: bytes, method: int, size: int, flags: int = 0, name: bytes = b"a.png") -> Path:
    """A zip archive with one member, written by hand: it states what it likes."""
    local = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 20, flags, method, 0, 0, 0, len(data), size, len(name), 0) + name
    central = struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", 20, 20, flags, method, 0, 0, 0, len(data), size, len(name),
                          0, 0, 0, 0, 0, 0) + name  # fmt: skip
    begin = len(local) + len(data)
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 1, 1, len(central), begin, 0)
    (folder / "x.zip").write_bytes(local + data + central + end)
    return folder / "x.zip"


@functools.cache
def deflated(size: int) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return b"".join(packer.compress(bytes(10**6)) for _ in range(size // 10**6)) + packer.flush()


@functools.cache
def lzma_member(size: int) -> bytes:
    packed = lzma.LZMACompressor(lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA1, "preset": 0}])
    data = b"".join(packed.compress(bytes(10**6)) for _ in range(size // 10**6)) + packed.flush()
    return struct.pack("<BBH", 9, 4, 5) + b"\x5d" + struct.pack("<I", 2**18) + data


def damaged_zip(folder: Path, change: Callable[[bytearray], None]) -> Path:
    data = bytearray(sound_zip(folder).read_bytes())
    change(data)
    (folder / "x.zip").write_bytes(data)
    return folder / "x.zip"


def _put(at: int, value: bytes) -> Callable[[bytearray], None]:
    def write(data: bytearray) -> None:
        place = at if at >= 0 else len(data) + at
        data[place : place + len(value)] = value

    return write


def other_count(folder: Path) -> Path:
    """A zip archive that states 9999 members, which nobody reads."""
    return damaged_zip(folder, _put(-12, struct.pack("<H", 9999)))


ZIPS: dict[str, Callable[[Path], Path]] = {
    "deflated zeros of 300 MB": lambda f: zip_with(f, deflated(3 * 10**8), 8, 3 * 10**8),
    "deflated zeros of 1 GB that state 100 bytes": lambda f: zip_with(f, deflated(10**9), 8, 100),
    "bz2 of 1 GB that states 100 bytes": lambda f: zip_with(f, bz2.compress(bytes(10**8)) * 10, 12, 100),
    "LZMA of 500 MB that states 100 bytes": lambda f: zip_with(f, lzma_member(5 * 10**8), 14, 100),
    "a member that states 4 GB": lambda f: zip_with(f, b"short", 0, 2**32 - 2),
    "a member that states less than it has": lambda f: zip_with(f, encode_png(FIRST), 0, 10),
    "an encrypted member": lambda f: zip_with(f, encode_png(FIRST), 0, 200, flags=1),
    "another encryption": lambda f: zip_with(f, encode_png(FIRST), 0, 200, flags=0x41),
    "a method of which nobody knows": lambda f: zip_with(f, encode_png(FIRST), 77, 200),
    "a name that is no UTF-8": lambda f: zip_with(f, b"x", 0, 1, flags=0x800, name=b"\xff\xfe.png"),
    "a name twice": lambda f: zipped(f, ("a.png", encode_png(FIRST)), ("a.png", encode_png(PIXELS[1]))),
    "names that lead out of it and no image": lambda f: zipped(f, ("../../a.png", b"x"), ("/etc/b.png", b"x")),
    "no image": lambda f: zipped(f, ("a.txt", b"x")),
    "an image bomb": lambda f: zipped(f, ("a.png", BOMB)),
    "a wrong checksum": lambda f: damaged_zip(f, _put(60, b"\xff\xff")),
    "a place before the file": lambda f: damaged_zip(f, _put(-6, struct.pack("<I", 2**32 - 9))),
    "a directory of 4 GB": lambda f: damaged_zip(f, _put(-10, struct.pack("<I", 2**32 - 9))),
    "another local header": lambda f: damaged_zip(f, _put(30, b"b.png")),
    "text": lambda f: _text_zip(f),
}


def _text_zip(folder: Path) -> Path:
    (folder / "x.zip").write_bytes(b"nothing")
    return folder / "x.zip"


def tar_of(folder: Path, *headers: bytes) -> Path:
    (folder / "x.tar").write_bytes(b"".join(headers) + bytes(1024))
    return folder / "x.tar"


def member(name: str, data: bytes = b"", size: bytes = b"", kind: bytes = b"0") -> bytes:
    """A member of a tar file, written by hand; `size` is the field as it stands there."""
    field = size or f"{len(data):011o}\0".encode()
    block = bytearray(512)
    block[0 : len(name)] = name.encode()
    block[100:108], block[124:136], block[156:157], block[257:265] = b"0000644\0", field, kind, b"ustar\00000"
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block) + data + bytes(-len(data) % 512)


def pax(**records: str) -> bytes:
    lines = b""
    for key, value in records.items():
        body = f" {key.replace('__', '.')}={value}\n"
        length = len(body) + 2
        lines += f"{length}{body}".encode()
    return member("p", lines, kind=b"x")


def binary(size: int) -> bytes:
    """A size as GNU tar writes large and negative ones."""
    return size.to_bytes(12, "big", signed=True) if size < 0 else b"\x80" + size.to_bytes(11, "big")


SPARSE = {"GNU__sparse__major": "1", "GNU__sparse__minor": "0", "GNU__sparse__realsize": str(2**40)}
TARS: dict[str, Callable[[Path], Path]] = {
    "a negative size": lambda f: tar_of(f, member("a.png", size=binary(-512))),
    "a long name of negative size": lambda f: tar_of(f, member("a.png", size=binary(-512), kind=b"L")),
    "a long name of 8 GB": lambda f: tar_of(f, member("a.png", size=binary(2**33), kind=b"L")),
    "other headers of 8 GB": lambda f: tar_of(f, member("a.png", size=binary(2**33), kind=b"x")),
    "an image of 8 GB": lambda f: tar_of(f, member("a.png", size=binary(2**33))),
    "an image of 2**90 bytes": lambda f: tar_of(f, member("a.png", size=binary(2**87))),
    "a size in its other headers": lambda f: tar_of(f, pax(size=str(2**40)), member("a.png", encode_png(FIRST))),
    "a negative size in its other headers": lambda f: tar_of(f, pax(size="-512"), member("a.png", encode_png(FIRST))),
    "a size that is no number": lambda f: tar_of(f, pax(size="x"), member("a.png", b"")),
    "ten thousand other headers": lambda f: tar_of(f, *[pax(a="b")] * 10_000, member("a.png", b"")),
    "a sparse image": lambda f: tar_of(
        f,
        pax(GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__realsize=str(2**40)),
        member("a.png", b"1\n"),
    ),
    "links": lambda f: tar_of(f, member("a.png", kind=b"2"), member("b.png", kind=b"1"), member("c.png", kind=b"6")),
    "an image bomb": lambda f: tar_of(f, member("a.png", BOMB)),
    "an image that is cut": lambda f: tar_of(f, member("a.png", encode_png(FIRST)[:80])),
    "a wrong checksum": lambda f: tar_of(f, b"x" + member("a.png", b"")[1:]),
    "text": lambda f: tar_of(f, b"nothing"),
    "nothing": lambda f: tar_of(f),
    "compressed": lambda f: _gzip_tar(f),
}


def _gzip_tar(folder: Path) -> Path:
    path = tar_of(folder, member("a.png", encode_png(FIRST)))
    path.write_bytes(gzip.compress(path.read_bytes()))
    return path


def sound_tar(folder: Path) -> Path:
    with tarfile.open(folder / "x.tar", "w") as archive:
        for number, pixels in enumerate(PIXELS):
            item = tarfile.TarInfo(f"{number}.png")
            data = encode_png(pixels)
            item.size = len(data)
            archive.addfile(item, io.BytesIO(data))
    return folder / "x.tar"


# --- arrays of images


def array(folder: Path, values: bytes | np.ndarray) -> Path:
    path = folder / "x.npy"
    if isinstance(values, bytes):
        path.write_bytes(values)
    else:
        np.save(path, values, allow_pickle=True)
    return path


def hole(folder: Path, shape: tuple[int, ...], size: int) -> Path:
    """An array in a file that takes no room on the disk."""
    path = array(folder, npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"))
    os.truncate(path, size)
    return path


ARRAYS: dict[str, Callable[[Path], Path]] = {
    "objects": lambda f: array(f, np.array([Executes()] * 2, dtype=object)),
    "fractions": lambda f: array(f, PIXELS.astype(np.float32)),
    "no images": lambda f: array(f, PIXELS[:0]),
    "images without pixels": lambda f: array(f, PIXELS[:, :0]),
    "images without width": lambda f: array(f, PIXELS[:, :, :0]),
    "two channels": lambda f: array(f, PIXELS[..., :2]),
    "one image": lambda f: array(f, PIXELS[0]),
    "a scalar": lambda f: array(f, np.uint8(7)),
    "a negative shape": lambda f: array(
        f, npy("{'descr': '|u1', 'fortran_order': False, 'shape': (-3, -8, 8, 3), }", bytes(600))
    ),
    "a shape larger than the file": lambda f: array(
        f, npy("{'descr': '|u1', 'fortran_order': False, 'shape': (10000000, 1000, 1000, 3), }", bytes(600))
    ),
    "a shape that overflows": lambda f: array(
        f, npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({2**62}, 8, 8, 3), }}", bytes(600))
    ),
    "an image of 30 GB": lambda f: hole(f, (1, 100_000, 100_000, 3), 3 * 10**10 + 1000),
    "a call in the header": lambda f: array(f, npy(f"__import__('os').system('touch {MARK}')")),
    "text": lambda f: array(f, b"nothing"),
}
