"""IDX files, the format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from omegaconf import MISSING
from PIL import Image

from dvae.data.images import Crop, fit, protocol
from dvae.errors import UserError, one_line
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.sources import SOURCES, Item, Source

UNSIGNED_BYTE = 0x08


@SOURCES.register("idx")
class Idx(Source):
    """An IDX file of images, with an IDX file of labels where there is one (MNIST, Fashion-MNIST)."""

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        images: str = MISSING
        """Images file, such as train-images-idx3-ubyte, plain or .gz: (N, H, W) or (N, H, W, 3) unsigned bytes."""
        labels: str = ""
        """Labels file, such as train-labels-idx1-ubyte, plain or .gz: (N,) unsigned bytes; empty: no labels."""
        crop: Crop = Crop.center
        """center: the middle square; none: the whole image, squeezed where it is not square."""
        licence: str = Source.licence
        """Licence of the images with the credit it asks for; kept in the manifest."""

    def __init__(self, config: Config, io: Shapes) -> None:
        self.config, self.io = config, io
        self.licence, self.protocol = config.licence, protocol(config.crop)
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
            Image.fromarray(self.images[index]), self.io.image_size, self.io.channels, self.config.crop, str(index)
        )
        return Item(f"{index:07d}", pixels, {} if self.labels is None else {"label": int(self.labels[index])})


def read_idx(path: str, field: str) -> np.ndarray:
    """The array of an IDX file: two zero bytes, a type byte, the number of dimensions, big-endian sizes, data.

    Raises UserError, naming the config's `field`, where the file is missing, not IDX, or of another length.
    """
    try:
        data = Path(path).expanduser().read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except FileNotFoundError:
        raise UserError(f"{field}={path} does not exist: name an IDX file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{field}={path} cannot be read: {one_line(error)}") from None
    magic = data[:4]
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] != UNSIGNED_BYTE:
        raise UserError(
            f"{field}={path} is not an IDX file of unsigned bytes: it begins with 0x{magic.hex()}, not 0x000008"
        )
    header = 4 + 4 * magic[3]
    shape = struct.unpack(f">{magic[3]}I", data[4:header]) if len(data) >= header else ()
    expected = header + int(np.prod(shape, dtype=np.int64))
    if not shape or len(data) != expected:
        raise UserError(f"{field}={path} is {len(data)} bytes long, its header says {expected}: the file is damaged")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
