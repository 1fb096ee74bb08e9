"""Output formats of images, selected by the name of the output.

Every writer leaves the output either complete or absent.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dvae.data.images import encode_png
from dvae.data.shards.tar_files import ShardWriter
from dvae.errors import UserError
from dvae.tracking import pictures
from dvae.utils import atomic_files

MAX_GRID_RESULTS = 1024
"""Maximum number of results in one picture if a result has one or two images. With more images it is lower."""
COLUMNS = 8
"""Number of images in a row of a picture. A row is longer only if one result has more images."""
Tiles = tuple[int, int]
"""Rows and columns of the images of one result."""


@dataclass(frozen=True)
class OutputItem:
    """The output of one result."""

    number: int
    """Number of the result."""
    pixels: np.ndarray
    """The images of the result side by side, (rows * H, columns * W, C) uint8."""
    about: bytes | None = None
    """The class as JSON, in the format of dvae's own shards; None if the run has no classes. Only a tar stores it."""


OutputItems = Iterator[OutputItem]
"""Results in the order of their numbers."""
Writer = Callable[[Path, OutputItems, int, Tiles], None]
"""write(out, results, number of results, tiles of each result)."""


@dataclass(frozen=True)
class OutputFormat:
    """A format in which images are written."""

    write: Writer
    """Function that writes all results."""
    replaceable: bool = False
    """Whether an existing output is replaced. A picture is replaced; a set of images is not."""


def write_grid(out: Path, results: OutputItems, count: int, tiles: Tiles) -> None:
    """Write one picture.

    A row has as many results as fit into 8 images, and at least one. If a result has several rows, there is one result
    per row of the picture.
    """
    (rows, columns), wide = tiles, np.stack([result.pixels for result in results])
    n, height, width, channels = wide.shape
    cells = torch.from_numpy(wide).view(n, rows, height // rows, columns, width // columns, channels)
    results_per_row = max(1, COLUMNS // columns) if rows == 1 else 1
    pictures.grid(cells.permute(0, 1, 3, 5, 2, 4).flatten(0, 2), out, columns=results_per_row * columns)


def write_folder(out: Path, results: OutputItems, count: int, tiles: Tiles) -> None:
    """Write a folder with 000000.png, 000001.png, and so on."""
    with atomic_files.new_folder(out) as aside:
        for result in results:
            (aside / png_name(result.number)).write_bytes(encode_png(result.pixels))


def write_npy(out: Path, results: OutputItems, count: int, tiles: Tiles) -> None:
    """Write one uint8 array (n, H, W, C)."""

    def write(aside: Path) -> None:
        array: np.ndarray | None = None
        for row, result in enumerate(results):
            if array is None:
                array = np.lib.format.open_memmap(aside, "w+", np.uint8, (count, *result.pixels.shape))
            array[row] = result.pixels
        assert isinstance(array, np.memmap)
        array.flush()

    atomic_files.write_file(out, write)


def write_zip(out: Path, results: OutputItems, count: int, tiles: Tiles) -> None:
    """Write a zip archive of PNGs. It does not compress them, because PNGs are already compressed."""

    def write(aside: Path) -> None:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
            for result in results:
                # ZipInfo has the fixed date 1980-01-01, so the same images give the same bytes
                member = zipfile.ZipInfo(png_name(result.number))
                member.external_attr = 0o644 << 16
                archive.writestr(member, encode_png(result.pixels))

    atomic_files.write_file(out, write)


def write_tar(out: Path, results: OutputItems, count: int, tiles: Tiles) -> None:
    """Write a WebDataset shard of PNGs. If the run has classes, a .json beside each PNG holds its class."""

    def write(aside: Path) -> None:
        shard = ShardWriter(aside)
        for result in results:
            about = {} if result.about is None else {"json": result.about}
            shard.write(result.number, {"png": encode_png(result.pixels)} | about)
        shard.close()

    atomic_files.write_file(out, write)


def png_name(number: int) -> str:
    return f"{number:06d}.png"


FORMATS = {
    ".png": OutputFormat(write_grid, replaceable=True),
    ".npy": OutputFormat(write_npy),
    ".zip": OutputFormat(write_zip),
    ".tar": OutputFormat(write_tar),
    "": OutputFormat(write_folder),
}


def output_format(out: str) -> tuple[Path, OutputFormat]:
    """Return the path and the format of `out`. Raises UserError if the name does not select a format."""
    path = Path(out)
    if not path.name or path.name == "..":
        raise UserError(f"out={out}: give the name of a file or of a new folder")
    if out.endswith("/") or path.is_dir():
        return path, FORMATS[""]
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"out={out}: use a name that ends with .png (one picture), .npy, .zip, .tar, or / for a folder")
    return path, FORMATS[path.suffix.lower()]
