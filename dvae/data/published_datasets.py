"""Helpers for published data sets: splits, attribute lists, and checks for square images of a known size."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from dvae.data.images import DamagedImage, printable
from dvae.errors import UserError, fold
from dvae.utils.read import DamagedFile, read_text

LIMIT = 256 * 2**20
"""Maximum size of an attribute list in bytes. The list of CelebA has 27 million bytes."""


class PublishedSplit(Enum):
    """Part of a data set, as split by its authors."""

    train = "train"
    test = "test"
    all = "all"


def require_square(image: Image.Image, name: str, size: int) -> Image.Image:
    """Return `image` if it is square and at least `size` pixels wide.

    Raises DamagedImage otherwise, because the file is not from the data set or would have to be enlarged.
    """
    width, height = image.size
    if width != height:
        raise DamagedImage(f"{name}: {width}x{height} pixels, the images of this data set are square")
    if width < size:
        raise DamagedImage(f"{name}: {width} pixels wide, {size} would enlarge it: use size={width} or less")
    return image


class AttributeList:
    """Binary attributes of images, read from an attribute list of CelebA or CelebAMask-HQ.

    The first line of the file holds the number of images, the second the attribute names. Each further line holds a
    file name and a 1 or -1 per attribute (list_attr_celeba.txt, CelebAMask-HQ-attribute-anno.txt).
    """

    def __init__(self, path: str, files: list[str]) -> None:
        """Read the attributes of `files`, which are paths of which only the file name counts.

        Raises UserError if the list is missing, malformed, or lacks one of the files.
        """
        try:
            lines = read_text(Path(path).expanduser(), LIMIT).splitlines()
        except (OSError, DamagedFile) as error:
            raise UserError(
                f"source.attributes={path} cannot be read ({fold(error)}): name list_attr_celeba.txt"
            ) from None
        self.names, values = _parse(path, [line for line in lines if line.strip()])
        wanted = [PurePosixPath(file).name for file in files]
        lacking = next((name for name in wanted if name not in values), None)
        if lacking is not None:
            raise UserError(
                f"source.attributes={path} has no line for {printable(lacking)}: name the list of the same data set"
            )
        self._values = np.stack([values[name] for name in wanted])

    def of(self, index: int) -> dict[str, str | int]:
        """Return a mapping from attribute name to 1 or 0 for image number `index` of `files`."""
        return {name: int(value) for name, value in zip(self.names, self._values[index], strict=True)}


def _parse(path: str, lines: list[str]) -> tuple[list[str], dict[str, np.ndarray]]:
    """Parse the lines of an attribute list.

    Returns the A attribute names, and a uint8 array (A,) of 0 and 1 per file name. Raises UserError if malformed.
    """
    if len(lines) < 3 or not re.fullmatch("[0-9]{1,12}", lines[0].strip()):
        raise UserError(
            f"source.attributes={path} is not an attribute list: it must begin with the number of images and the names"
        )
    names = lines[1].split()
    values: dict[str, np.ndarray] = {}
    for number, line in enumerate(lines[2:], 3):
        file, *marks = line.split()
        if len(marks) != len(names) or not set(marks) <= {"1", "-1"}:
            raise UserError(
                f"source.attributes={path} line {number} ({printable(file)}): {len(names)} values of 1 or -1 "
                "must follow the file name"
            )
        values[file] = np.array([mark == "1" for mark in marks], np.uint8)
    if len(values) != int(lines[0]):
        raise UserError(
            f"source.attributes={path} announces {lines[0].strip()} images but lists {len(values)}: get the whole file"
        )
    return names, values
