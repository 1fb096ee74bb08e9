"""IDX files: the file format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import io as bytes_io
import math
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import MISSING
from PIL import Image

from dvae.data.images import Crop, fit, protocol
from dvae.errors import UserError, fold
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.sources.base import SOURCES, Item, Source
from dvae.utils.read import DamagedFile, read_bytes

UNSIGNED_BYTE = 0x08
LIMIT = 2**30
"""Largest accepted file in bytes, compressed or not. The largest file of EMNIST has 547 million bytes."""


@SOURCES.register("idx")
class Idx(Source):
    """An IDX file of images, and optionally an IDX file of their labels (MNIST, Fashion-MNIST)."""

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        images: str = MISSING
        """File of images (N, H, W) or (N, H, W, 3), unsigned bytes, plain or .gz, such as train-images-idx3-ubyte."""
        labels: str = ""
        """File of labels (N,), unsigned bytes, plain or .gz, such as train-labels-idx1-ubyte (empty: no labels)."""
        crop: Crop = Crop.center
        """center: crop the center square. none: keep the whole image, and squeeze it if it is not square."""
        license: str = Source.license
        """License of the images, with the credit that it requires. It is stored in the manifest."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        self.config, self.shapes = config, shapes
        self.license, self.protocol = config.license, protocol(config.crop)
        self.images = read_idx(config.images, "source.images")
        if self.images.ndim not in (3, 4) or (self.images.ndim == 4 and self.images.shape[3] != 3):
            raise UserError(
                f"source.images={config.images} has shape {self.images.shape}: it must be (N, H, W) or (N, H, W, 3)"
            )
        if self.images.size == 0:
            raise UserError(f"source.images={config.images} holds no images: shape {self.images.shape}")
        self.labels = read_idx(config.labels, "source.labels") if config.labels else None
        if self.labels is not None and self.labels.shape != (len(self.images),):
            raise UserError(
                f"source.labels={config.labels} has shape {self.labels.shape}, there are {len(self.images)} images: "
                "name the labels file of the same set"
            )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        pixels = fit(
            Image.fromarray(self.images[index]),
            self.shapes.image_size,
            self.shapes.channels,
            self.config.crop,
            str(index),
        )
        return Item(f"{index:07d}", pixels, {} if self.labels is None else {"label": int(self.labels[index])})


def read_idx(path: str, field: str) -> np.ndarray:
    """Read the array of an IDX file.

    An IDX file holds two zero bytes, a type byte, the number of dimensions, the sizes (big-endian), and the data.
    Raises UserError if the file is missing, is not an IDX file, or has another length than its header says. The message
    names the config's `field`.
    """
    try:
        data = read_bytes(Path(path).expanduser(), LIMIT)
        raw: Any = bytes_io.BytesIO(data)
        with gzip.GzipFile(fileobj=raw) if data[:2] == b"\x1f\x8b" else raw as stream:
            shape = _shape(stream, f"{field}={path}")
            values = stream.read(math.prod(shape) + 1)  # the limit protects from archives that unpack to a huge size
    except FileNotFoundError:
        raise UserError(f"{field}={path} does not exist: name an IDX file") from None
    except DamagedFile as error:
        raise UserError(f"{field}={path} {error.reason}: name an IDX file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{field}={path} cannot be read: {fold(error)}") from None
    if len(values) != math.prod(shape):
        held = f"{len(values)}" if len(values) < math.prod(shape) else "more"
        raise UserError(
            f"{field}={path} holds {held} bytes of images or labels, its header says {math.prod(shape)}: "
            "the file is damaged"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)


def _shape(stream: Any, word: str) -> tuple[int, ...]:
    """Read the sizes in the header. Raises UserError if this is not an IDX file or the array is larger than LIMIT."""
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != UNSIGNED_BYTE:
        raise UserError(f"{word} is not an IDX file of unsigned bytes: it begins with 0x{magic.hex()}, not 0x000008")
    sizes = stream.read(4 * magic[3])
    shape = struct.unpack(f">{magic[3]}I", sizes) if len(sizes) == 4 * magic[3] else ()
    if not shape or math.prod(shape) > LIMIT:
        raise UserError(f"{word} has the sizes {shape or 'of no array'}, at most {LIMIT} bytes: the file is damaged")
    return shape
