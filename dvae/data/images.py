"""Decode, crop, resize and encode images, and convert between uint8 and floats in [-1, 1].

All conversions between uint8 and floats use `to_float` and `to_uint8`.
"""

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
"""Pillow formats that may be opened, regardless of the file's suffix.

Other formats are refused because they may start programs: EPS starts Ghostscript.
"""
PIXELS = 2**26
"""Maximum number of pixels of an image that is decoded: 8192 x 8192."""
FILE_LIMIT = 256 * 2**20
"""Maximum size of an image file in bytes."""
PNG_BEGIN = b"\x89PNG\r\n\x1a\n"
LAST_FILTER = 4
"""Largest number of a PNG row filter; the numbers start at 0."""
TILE_TAGS = (322, 323)
"""TIFF tags that hold the width and height of the tiles in which an image is compressed."""

# Pillow warns about damaged metadata and large images. The errors that matter are raised in this module instead.
# These filters are set once instead of around each call, because `catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class DamagedImage(Exception):
    """An image that cannot be read. The message is one line that names the image and the reason."""

    def __init__(self, message: str) -> None:
        super().__init__(fold(message))


class Crop(Enum):
    """How an image is made square before it is resized."""

    center = "center"
    """Crop the center square whose side is the shorter side of the image."""
    none = "none"
    """Keep the whole image. Resizing changes its aspect ratio if it is not square."""


class Resize(Enum):
    """Pillow filter used to resize an image.

    When an image is scaled down, every filter averages over all source pixels of an output pixel. All filters are
    therefore antialiased.
    """

    lanczos = "lanczos"
    """Windowed sinc, the sharpest filter. AFHQ v2 and the StyleGAN2 data sets were made with it."""
    bilinear = "bilinear"
    """Triangle filter. torchvision's Resize uses it for Pillow images, and so does the code of DiffuseVAE and PSLD."""
    box = "box"
    """Plain mean, rounded after each axis. Matches the TFRecords of CelebA-HQ and FFHQ within one gray level."""


FILTERS = {
    Resize.lanczos: Image.Resampling.LANCZOS,
    Resize.bilinear: Image.Resampling.BILINEAR,
    Resize.box: Image.Resampling.BOX,
}


def protocol(crop: Crop, resize: Resize = Resize.lanczos) -> str:
    """Describe what `fit` does, for the manifest. Scores are comparable only if their protocols are equal."""
    return f"crop {crop.value}; {filtered(resize)}; transparency over white"


def filtered(resize: Resize) -> str:
    """Describe the resize filter, for the manifest."""
    return f"Pillow {resize.value.capitalize()}, antialiased"


def is_image_name(name: str) -> bool:
    """Return whether a file of this name counts as an image: it has an image suffix and is not hidden."""
    path = PurePath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def printable(name: str) -> str:
    """Return a file name as valid Unicode that JSON can hold. Undecodable bytes become backslash escapes."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


@functools.cache
def _formats() -> list[str]:
    """Return the FORMATS that the installed Pillow supports."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def open_image(data: bytes, name: str) -> Image.Image:
    """Open an image file and read its header only. Pillow decodes the pixels when they are first used.

    Raises DamagedImage naming `name` if the file is in none of FORMATS or has more than PIXELS pixels. Errors that
    Pillow raises later for damaged pixels are not translated: use `decode` for that.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
        tile = [int(image.tag_v2.get(tag, 1)) for tag in TILE_TAGS] if image.format == "TIFF" else [1, 1]  # type: ignore[attr-defined]
    except MemoryError:
        raise MachineError(f"{name}: there is not enough memory to open this image") from None
    except Image.DecompressionBombError:
        raise DamagedImage(f"{name}: more than {PIXELS} pixels: scale the image down first") from None
    except Exception as error:  # noqa: BLE001 decoders raise almost any exception for damaged bytes
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
    """Decode the first frame of an image file and rotate it upright as its EXIF tag says.

    Raises DamagedImage naming `name` for the same reasons as `open_image`, and for damaged pixels. Raises MachineError
    if there is not enough memory.
    """
    image = open_image(data, name)
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise MachineError(f"{name}: there is not enough memory for its {image.width}x{image.height} pixels") from None
    except Exception as error:  # noqa: BLE001 decoders raise almost any exception for damaged bytes
        raise DamagedImage(f"{name}: {fold(error)[:200] or type(error).__name__}") from None


def fit(
    image: Image.Image, size: int, channels: int, crop: Crop, name: str, resize: Resize = Resize.lanczos
) -> np.ndarray:
    """Crop an image to a square and resize it.

    Returns a uint8 array of shape (size, size, channels), with 1 or 3 channels. Raises DamagedImage naming `name` if
    the pixels have no stated value range.
    """
    flat = _eight_bit(image, "L" if channels == 1 else "RGB", name)
    width, height = flat.size
    box = (0, 0, width, height)
    if crop is Crop.center:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        box = (left, top, left + side, top + side)
    # Crop first instead of passing the box to `resize`: the filter would then also read pixels outside the box.
    square = flat.crop(box)
    if square.size != (size, size):
        square = square.resize((size, size), FILTERS[resize])
    return np.asarray(square).reshape(size, size, channels)


def _eight_bit(image: Image.Image, mode: str, name: str) -> Image.Image:
    """Convert an image to mode L or RGB, with transparent pixels over white. Raises DamagedImage for mode I or F."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).astype(np.float32) / 257.0).round().astype(np.uint8))
    elif image.mode in ("I", "F"):  # these modes state no value range, so the right scale is unknown
        raise DamagedImage(f"{name}: pixels of mode {image.mode} have no stated range, save it with 8 bits per channel")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert(mode)


def encode_png(pixels: np.ndarray) -> bytes:
    """Encode uint8 pixels (H, W, C), with C = 1 or 3, as PNG. The same pixels always give the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def check_png(data: bytes) -> None:
    """Raise DamagedImage unless the checksums of all chunks of a PNG file are correct."""
    for _ in _chunks(data):
        pass


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (kind, chunk) for each chunk of a PNG file; `chunk` includes its length and checksum.

    Raises DamagedImage for a wrong checksum or a truncated file.
    """
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
    """Read (C, H, W) from the header of a PNG.

    Raises DamagedImage unless it is a PNG as `encode_png` writes it: 8-bit gray or RGB.
    """
    if len(data) < 33 or data[8:16] != b"\0\0\0\rIHDR":
        raise DamagedImage("the PNG does not begin with its header")
    width, height, depth, color, *methods = struct.unpack_from(">IIBBBBB", data, 16)
    if depth != 8 or color not in (0, 2) or any(methods):
        raise DamagedImage(f"color type {color} with {depth} bits, methods {methods}: not plain 8-bit gray or RGB")
    return (1 if color == 0 else 3), height, width


def _plain_png(data: bytes, shape: tuple[int, int, int]) -> bytearray:
    """Return the PNG with only the chunks that its pixels need.

    Raises DamagedImage if the file is damaged or its shape is not `shape` (C, H, W). The shape is checked before memory
    is allocated for the pixels. Only the returned bytes may be passed to torchvision, because it can crash the process
    (SIGSEGV) on a wrong checksum or wrong compressed data.
    """
    if data[:8] == PNG_BEGIN and (found := png_shape(data)) != shape:
        raise DamagedImage(f"shape {found}, not {shape}")
    chunks = [(kind, chunk) for kind, chunk in _chunks(data) if kind in (b"IHDR", b"IDAT", b"IEND")]
    if [kind for kind, _ in chunks].count(b"IHDR") != 1:
        raise DamagedImage("the PNG has several headers")
    channels, height, width = shape
    # Each row has one filter byte before its pixels. Asking for one byte more than expected detects excess data.
    wanted, inflate = height * (1 + width * channels), zlib.decompressobj()
    try:
        rows = inflate.decompress(b"".join(chunk[8:-4] for kind, chunk in chunks if kind == b"IDAT"), wanted + 1)
    except zlib.error as error:
        raise DamagedImage(f"its pixels cannot be decompressed ({error})") from None
    if len(rows) != wanted or not inflate.eof or max(rows[:: 1 + width * channels]) > LAST_FILTER:
        raise DamagedImage("its pixels do not match its header")
    return bytearray(PNG_BEGIN) + b"".join(chunk for _, chunk in chunks)


def png_limit(shape: tuple[int, int, int]) -> int:
    """Return the maximum size in bytes of a PNG of `shape` (C, H, W).

    Compression never makes a PNG twice as large as its pixels.
    """
    channels, height, width = shape
    return 2 * height * (width * channels + 1) + 2**16


def decode_png(data: bytes, shape: tuple[int, int, int]) -> torch.Tensor:
    """Decode a PNG to a uint8 tensor of `shape` (C, H, W).

    Raises DamagedImage if its checksums, header or pixels are damaged, or if it has another shape.
    """
    # Imported here because importing torchvision takes seconds and modules that only read a config do not need it.
    from torchvision.io import ImageReadMode, decode_image

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
    """Convert uint8 in [0, 255] to float32 in [-1, 1]. The shape is arbitrary."""
    return images.to(torch.float32) / 127.5 - 1.0


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Convert floats in [-1, 1] to uint8, rounded to nearest and clamped. This is the inverse of `to_float`."""
    return ((images.to(torch.float32) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
