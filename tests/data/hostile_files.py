"""Files that are none, PNG files and .npy files made by hand: what the hostile shards and images are made of."""

from __future__ import annotations

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
"""The images of all sound files, (n, H, W, C)."""
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) print showpage\n%%EOF\n"
MARK = "executed"
"""File that comes to the working folder if something in a file is executed."""


# --- files that are none


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


SPECIAL: dict[str, Callable[[Path], None]] = {
    "a pipe": fifo,
    "a socket": bound_socket,
    "a folder": Path.mkdir,
    "a link to zeros": lambda path: path.symlink_to("/dev/zero"),
    "a link to a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "an empty file": Path.touch,
}


# --- PNG files, made by hand


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def header(width: int, height: int, depth: int = 8, color: int = 2, interlaced: int = 0) -> bytes:
    return chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced))


def png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def rows(pixels: np.ndarray) -> bytes:
    """The bytes under the compression of a PNG."""
    return b"".join(b"\0" + row.tobytes() for row in pixels)


FIRST = PIXELS[0]
SCANS = chunk(b"IDAT", zlib.compress(rows(FIRST)))
BOMB = png(header(50_000, 50_000), chunk(b"IDAT", zlib.compress(bytes(10**6))))
"""7.5 GB of pixels."""
PNGS: dict[str, bytes] = {
    "50000x50000": BOMB,
    "2**31 wide": png(header(2**31 - 1, 1), SCANS),
    "no width": png(header(0, 8), SCANS),
    "another height": png(header(8, 9), SCANS),
    "16 bits": png(header(8, 8, 16), chunk(b"IDAT", zlib.compress(bytes(49 * 8)))),
    "a palette": png(header(8, 8, 8, 3), chunk(b"PLTE", bytes(3)), chunk(b"IDAT", zlib.compress(bytes(72)))),
    "alpha": png(header(8, 8, 8, 6), chunk(b"IDAT", zlib.compress(bytes(33 * 8)))),
    "gray": png(header(8, 8, 8, 0), chunk(b"IDAT", zlib.compress(bytes(72)))),
    "color type 7": png(header(8, 8, 8, 7), SCANS),
    "no header": png(SCANS),
    "a late header": png(chunk(b"tEXt", b"a\0b"), header(8, 8), SCANS),
    "a second header": png(header(8, 8), header(50_000, 50_000), SCANS),
    "no pixels": png(header(8, 8)),
    "pixels that are cut": png(header(8, 8), chunk(b"IDAT", zlib.compress(rows(FIRST))[:-60])),
    "pixels that are no zlib": png(header(8, 8), chunk(b"IDAT", b"nonsense")),
    "more pixels than the header says": png(header(8, 8), chunk(b"IDAT", zlib.compress(rows(FIRST) + bytes(10**7)))),
    "pixels without their checksum": png(header(8, 8), chunk(b"IDAT", zlib.compress(rows(FIRST))[:-4])),
    "interlaced": png(header(8, 8, interlaced=1), SCANS),
    "a wrong filter": png(header(8, 8), chunk(b"IDAT", zlib.compress(b"\x09" * 200))),
    "no end": png(header(8, 8), SCANS)[:-12],
    "a wrong checksum": png(header(8, 8), SCANS[:-1] + b"\0"),
    "a chunk of 4 GB": b"\x89PNG\r\n\x1a\n" + header(8, 8) + struct.pack(">I", 2**32 - 1) + b"IDAT" + bytes(50),
    "a long text": png(header(8, 8), chunk(b"tEXt", b"a\0" + bytes([65]) * 200_000), SCANS),
    "JPEG": b"",
    "EPS": EPS,
    "nothing": b"",
}
_jpeg = io.BytesIO()
Image.fromarray(FIRST).save(_jpeg, "JPEG")
PNGS["JPEG"] = _jpeg.getvalue()
SOUND_PNGS: dict[str, bytes] = {
    "a compressed color profile of 100 MB": png(
        header(8, 8), chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**7), 9)), SCANS
    ),
    "transparency, a palette and a critical part of which nobody knows": png(
        header(8, 8), chunk(b"PLTE", bytes(7)), chunk(b"tRNS", bytes(6)), chunk(b"ABCD", b"x"), SCANS
    ),
    "its pixels in many parts": png(
        header(8, 8), *[chunk(b"IDAT", bytes([one])) for one in zlib.compress(rows(FIRST))]
    ),
    "something after its end": png(header(8, 8), SCANS) + b"nonsense",
}
ABOUT = b'{"key": "0", "labels": {"kind": "cat"}}'
TEXTS: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "a number": b"7",
    "no labels": b'{"key": "0"}',
    "no key": b'{"labels": {}}',
    "a number as key": b'{"key": 0, "labels": {}}',
    "labels in a list": b'{"key": "0", "labels": ["kind"]}',
    "labels of labels": b'{"key": "0", "labels": {"kind": {"kind": "cat"}}}',
    "a fraction as label": b'{"key": "0", "labels": {"kind": 0.5}}',
    "no label": b'{"key": "0", "labels": {"kind": null}}',
    "one more field": b'{"key": "0", "labels": {}, "more": 1}',
    "a key twice": b'{"key": "0", "key": "1", "labels": {}}',
    "NaN": b'{"key": "0", "labels": {"kind": NaN}}',
    "a number of 5000 digits": b'{"key": "0", "labels": {"kind": ' + b"9" * 5000 + b"}}",
    "a million brackets": b"[" * 10**6,
    "bytes that are no UTF-8": b'{"key": "\xff", "labels": {}}',
    "half a character": b'{"key": "\\ud800", "labels": {}}',
    "2 MB": b'{"key": "' + b"x" * 2 * 10**6 + b'", "labels": {}}',
}


# --- arrays


def npy(description: str, data: bytes = b"") -> bytes:
    """A .npy file with any header."""
    padded = description.encode().ljust(118 - description.count("\n")) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded + data


class Executes:
    """What a pickle of it does shows."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARK}",)
