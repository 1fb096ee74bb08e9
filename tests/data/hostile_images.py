"""Image files that a stranger could send: headers that promise too much, and formats that start programs."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from hostile_files import BOMB, EPS, FIRST, PIXELS, PNGS, SCANS, chunk, header, png
from PIL import Image

from dvae.data.images import encode_png


def header_of(kind: str) -> bytes:
    """The beginning of a file whose header promises far more pixels than there are."""
    file = io.BytesIO()
    Image.fromarray(FIRST).save(file, kind)
    data = bytearray(file.getvalue())
    if kind == "BMP":
        data[18:26] = struct.pack("<ii", 2**30, 2**30)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", 65535, 65535)
    elif kind == "JPEG":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", 65500, 65500)
    elif kind == "PPM":
        return b"P6 100000 100000 255\n" + bytes(1000)
    elif kind == "JPEG2000":
        at = data.index(b"ihdr") + 4
        data[at : at + 8] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    return bytes(data)


def webp(width: int, height: int) -> bytes:
    """An animation without frames on a canvas of this size."""
    canvas = b"\x02\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def tiff(entries: list[tuple[int, int, int, int]], data: bytes) -> bytes:
    """A little-endian TIFF with these (tag, type, count, value); `data` comes after them."""
    head = b"II*\0" + struct.pack("<IH", 8, len(entries))
    return head + b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries)) + bytes(4) + data


def tiled(side: int) -> bytes:
    """8x8 gray pixels in one tile of `side` x `side`, deflated zeros of 100 MB."""
    packed = zlib.compress(bytes(10**8), 9)
    entries = [(256, 4, 1, 8), (257, 4, 1, 8), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1),
               (322, 4, 1, side), (323, 4, 1, side), (324, 4, 1, 134), (325, 4, 1, len(packed))]  # fmt: skip
    return tiff(entries, packed)


def striped(width: int, height: int, rows: int) -> bytes:
    """Gray pixels in strips of so many rows, of which there is one."""
    packed = zlib.compress(bytes(10**7), 9)
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1),
               (273, 4, 1, 122), (277, 3, 1, 1), (278, 4, 1, rows), (279, 4, 1, len(packed))]  # fmt: skip
    return tiff(entries, packed)


def large_png() -> bytes:
    """A whole PNG of 8200x8200 pixels, a little more than may be."""
    packer = zlib.compressobj(9)
    row = bytes(1 + 8200)
    data = b"".join(packer.compress(row) for _ in range(8200)) + packer.flush()
    return png(header(8200, 8200, 8, 0), chunk(b"IDAT", data))


IMAGES: dict[str, Callable[[], bytes]] = {
    "PNG of 50000x50000": lambda: BOMB,
    "PNG of 8200x8200": large_png,
    "PNG with 1 GB of text": lambda: png(
        header(8, 8), *[chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**7), 9))] * 100, SCANS
    ),
    **{f"{kind} of a billion pixels": lambda kind=kind: header_of(kind) for kind in
       ("BMP", "GIF", "JPEG", "PPM", "JPEG2000")},
    "WEBP of 16384x16384": lambda: webp(16384, 16384),
    "WEBP of 2**24 x 2**24": lambda: webp(2**24, 2**24),
    "TIFF in a tile of 65536x65536": lambda: tiled(65536),
    "TIFF in a tile of 2**31": lambda: tiled(2**31 - 1),
    "TIFF of 2**31 x 2**31": lambda: striped(2**31 - 1, 2**31 - 1, 1),
    "TIFF without strips": lambda: tiff([(256, 4, 1, 8), (257, 4, 1, 8)], b""),
    "TIFF whose directory is itself": lambda: b"II*\0" + struct.pack("<I", 0) * 10,
    "EPS": lambda: EPS,
    "EPS in a DOS file": lambda: b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(EPS)) + bytes(20) + EPS,
    "WMF": lambda: b"\xd7\xcd\xc6\x9a" + bytes(100),
    "SVG": lambda: b"<svg xmlns='http://www.w3.org/2000/svg' width='8' height='8'><image href='file:///etc/passwd'/></svg>",
    "HTML": lambda: b"<html><script>alert(1)</script></html>",
    "zeros": lambda: bytes(1000),
    "nothing": lambda: b"",
    "half a JPEG": lambda: PNGS["JPEG"][:300],
    "a PNG without its pixels": lambda: png(header(8, 8)),
}  # fmt: skip


def picture_in_folder(folder: Path, data: bytes) -> Path:
    (folder / "a.png").write_bytes(data)
    return folder


def pictures(folder: Path) -> Path:
    for number, pixels in enumerate(PIXELS):
        (folder / f"{number}.png").write_bytes(encode_png(pixels))
    return folder


def special_picture(folder: Path, make: Callable[[Path], None]) -> Path:
    make(folder / "a.png")
    return folder


def sparse_picture(folder: Path) -> Path:
    with (folder / "a.png").open("wb") as file:
        file.truncate(2**40)
    return folder
