"""Images: decoding, the resize and crop protocol, PNG, and the one conversion between uint8 and [-1, 1] floats."""

from __future__ import annotations

import functools
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from enum import Enum
from pathlib import PurePath

import numpy as np
import torch
from PIL import Image, ImageOps

from dvae.errors import MachineError, fold

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Pillow's formats that are opened, whatever a file is called. Others may start programs (EPS starts Ghostscript)."""
PIXELS = 2**26
"""Pixels of an image that is decoded, at most: 8192 x 8192."""
FILE_LIMIT = 256 * 2**20
"""Bytes of an image file, at most."""
PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
LAST_FILTER = 4
"""Of the filters of a PNG's rows, which are numbered from 0."""
TILE_TAGS = (322, 323)
"""TIFF: width and height of the tiles in which an image is compressed."""

# Pillow warns of damaged metadata and of large images, in lines of its own. What matters is raised as an error here.
# These filters are set once and not around each call, because `catch_warnings` is not safe with threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class DamagedImage(Exception):
    """An image that cannot be read; the message, of one line, names it and says why."""

    def __init__(self, message: str) -> None:
        super().__init__(fold(message))


class Crop(Enum):
    """How an image becomes a square before it is resized."""

    center = "center"
    """The middle square, as wide as the shorter side."""
    none = "none"
    """The whole image, squeezed where it is not square."""


class Resize(Enum):
    """Pillow's filter for scaling; each averages over all pixels that fall together, so all are antialiased."""

    lanczos = "lanczos"
    """Windowed sinc: the sharpest, and what AFHQ v2 and StyleGAN2's data sets were made with."""
    bilinear = "bilinear"
    """Triangle: what torchvision's Resize does with a Pillow image, so what DiffuseVAE's and PSLD's code does."""
    box = "box"
    """Plain mean, rounded after each axis: within one gray level of the TFRecords of CelebA-HQ and FFHQ."""


FILTERS = {
    Resize.lanczos: Image.Resampling.LANCZOS,
    Resize.bilinear: Image.Resampling.BILINEAR,
    Resize.box: Image.Resampling.BOX,
}


def protocol(crop: Crop, resize: Resize = Resize.lanczos) -> str:
    """The protocol of `fit` in words, for the manifest: figures compare only between equal protocols."""
    return f"crop {crop.value}; {filtered(resize)}; transparency over white"


def filtered(resize: Resize) -> str:
    """The filter in words, for the manifest."""
    return f"Pillow {resize.value.capitalize()}, antialiased"


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image: by its suffix, and not hidden."""
    path = PurePath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def printable(name: str) -> str:
    """A file name as valid Unicode (undecodable bytes become backslash escapes), fit for JSON."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


@functools.cache
def _formats() -> list[str]:
    """Those of FORMATS that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def open_image(data: bytes, name: str) -> Image.Image:
    """Open an image file of which only the header is read; Pillow decodes the pixels when they are used.

    Raises DamagedImage naming `name` for a file in none of FORMATS, and for more than PIXELS pixels. What Pillow raises
    for damaged pixels is not translated: see `decode`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
        tile = [int(image.tag_v2.get(tag, 1)) for tag in TILE_TAGS] if image.format == "TIFF" else [1, 1]  # type: ignore[attr-defined]
    except MemoryError:
        raise MachineError(f"{name}: there is not enough memory to open this image") from None
    except Image.DecompressionBombError:
        raise DamagedImage(f"{name}: more than {PIXELS} pixels: scale the image down first") from None
    except Exception as error:  # noqa: BLE001 damaged bytes make the decoders raise nearly anything
        reason = "not an image file" if isinstance(error, Image.UnidentifiedImageError) else str(error)
        raise DamagedImage(f"{name}: {fold(reason)[:200] or type(error).__name__}") from None
    width, height = image.size
    if max(width * height, tile[0] * tile[1]) > PIXELS:
        raise DamagedImage(
            f"{name}: {max(width, tile[0])}x{max(height, tile[1])} pixels, at most {PIXELS} are decoded: scale the "
            "image down first"
        )
    return image


def decode(data: bytes, name: str) -> Image.Image:
    """The first frame of an image file's bytes, turned upright by its EXIF tag.

    Raises DamagedImage naming `name` as `open_image` does, and for damaged pixels; MachineError if memory is short.
    """
    image = open_image(data, name)
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise MachineError(f"{name}: there is not enough memory for its {image.width}x{image.height} pixels") from None
    except Exception as error:  # noqa: BLE001 damaged bytes make the decoders raise nearly anything
        raise DamagedImage(f"{name}: {fold(error)[:200] or type(error).__name__}") from None


def fit(
    image: Image.Image, size: int, channels: int, crop: Crop, name: str, resize: Resize = Resize.lanczos
) -> np.ndarray:
    """`image` as (size, size, channels) uint8: crop to a square, then scale it. Raises DamagedImage."""
    flat = _eight_bit(image, "L" if channels == 1 else "RGB", name)
    width, height = flat.size
    box = (0, 0, width, height)
    if crop is Crop.center:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
    # the box is cropped before resizing (not passed to resize), so that pixels outside it cannot bleed in
    square = flat.crop(box)
    if square.size != (size, size):
        square = square.resize((size, size), FILTERS[resize])
    return np.asarray(square).reshape(size, size, channels)


def _eight_bit(image: Image.Image, mode: str, name: str) -> Image.Image:
    """The image in mode L or RGB, transparency laid over white."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257.0).round().astype(np.uint8))
    elif image.mode in ("I", "F"):  # no stated range: scaling them would be a guess
        raise DamagedImage(f"{name}: pixels of mode {image.mode} have no stated range, save it with 8 bits per channel")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert(mode)


def encode_png(pixels: np.ndarray) -> bytes:
    """PNG bytes of (H, W, C) uint8, C = 1 or 3; the same pixels always give the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def check_png(data: bytes) -> None:
    """Raise DamagedImage unless the checksum of every chunk of a PNG file holds."""
    for _ in _chunks(data):
        pass


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a PNG file: kind, and the whole chunk with its length and checksum. Raises as `check_png`."""
    if data[:8] != PNG_BEGIN:
        raise DamagedImage("not a PNG file")
    at, kind = 8, b""
    while kind != b"IEND":
        if at + 12 > len(data):
            raise DamagedImage("the PNG ends early")
        (size,) = struct.unpack_from(">I", data, at)
        kind = data[at + 4 : at + 8]
        end = at + 8 + size
        if end + 4 > len(data) or struct.unpack_from(">I", data, end)[0] != zlib.crc32(data[at + 4 : end]):
            raise DamagedImage(f"the checksum of its part at byte {at} fails")
        yield kind, data[at : end + 4]
        at = end + 4


def png_shape(data: bytes) -> tuple[int, int, int]:
    """(C, H, W) of a PNG as `encode_png` makes them, from its header. Raises DamagedImage for any other kind of PNG."""
    if len(data) < 33 or data[8:16] != b"\0\0\0\rIHDR":
        raise DamagedImage("the PNG does not begin with its header")
    width, height, depth, color, *methods = struct.unpack_from(">IIBBBBB", data, 16)
    if depth != 8 or color not in (0, 2) or any(methods):
        raise DamagedImage(f"color type {color} with {depth} bits, methods {methods}: not plain 8-bit gray or RGB")
    return (1 if color == 0 else 3), height, width


def _plain_png(data: bytes, shape: tuple[int, int, int]) -> bytearray:
    """The PNG without chunks that its pixels do not need.

    Raises DamagedImage if anything is damaged, or the shape is another, which is found before memory is taken.
    torchvision must see no other file: a wrong checksum or wrong compressed data can make it take the process down
    (SIGSEGV).
    """
    if data[:8] == PNG_BEGIN and (found := png_shape(data)) != shape:
        raise DamagedImage(f"shape {found}, not {shape}")
    chunks = [(kind, chunk) for kind, chunk in _chunks(data) if kind in (b"IHDR", b"IDAT", b"IEND")]
    if [kind for kind, _ in chunks].count(b"IHDR") != 1:
        raise DamagedImage("the PNG has several headers")
    channels, height, width = shape
    wanted, inflate = height * (1 + width * channels), zlib.decompressobj()
    try:
        rows = inflate.decompress(b"".join(chunk[8:-4] for kind, chunk in chunks if kind == b"IDAT"), wanted + 1)
    except zlib.error as error:
        raise DamagedImage(f"its pixels cannot be decompressed ({error})") from None
    if len(rows) != wanted or not inflate.eof or max(rows[:: 1 + width * channels]) > LAST_FILTER:
        raise DamagedImage("its pixels are not those of its header")
    return bytearray(PNG_BEGIN) + b"".join(chunk for _, chunk in chunks)


def png_limit(shape: tuple[int, int, int]) -> int:
    """Bytes that a PNG of `shape` (C, H, W) may have: compression never makes it twice as large as its pixels."""
    channels, height, width = shape
    return 2 * height * (width * channels + 1) + 2**16


def decode_png(data: bytes, shape: tuple[int, int, int]) -> torch.Tensor:
    """A PNG as uint8 of `shape` (C, H, W).

    Raises DamagedImage if its checksums, its header or its pixels are damaged, and for another shape.
    """
    from torchvision.io import ImageReadMode, decode_image  # here, since that takes seconds, and a config needs none

    plain = _plain_png(data, shape)
    mode = ImageReadMode.GRAY if shape[0] == 1 else ImageReadMode.RGB
    try:
        image = decode_image(torch.frombuffer(plain, dtype=torch.uint8), mode=mode)
    except (RuntimeError, ValueError) as error:
        raise DamagedImage(fold(error)[:120]) from None
    if tuple(image.shape) != shape:
        raise DamagedImage(f"shape {tuple(image.shape)}, not {shape}")
    return image


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1]; any shape."""
    return images.to(torch.float32) / 127.5 - 1.0


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Floats in [-1, 1] to uint8, rounded to the nearest and clamped; the inverse of `to_float`."""
    return ((images.to(torch.float32) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
