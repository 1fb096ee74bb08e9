"""What images are written as: chosen by the name of the result. Every writer leaves it complete or absent."""

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
"""Results of one or two images each; fewer of larger ones."""
COLUMNS = 8
"""Images in a row of a picture; more only where one result has more."""
Tiles = tuple[int, int]
"""Rows and columns of the images of one result."""


@dataclass(frozen=True)
class OutputItem:
    """What is written of one number."""

    number: int
    pixels: np.ndarray
    """(rows H, columns W, C) uint8: its images, laid side by side."""
    about: bytes | None = None
    """JSON of its class as in dvae's own shards, where the run has classes; a tar keeps it."""


OutputItems = Iterator[OutputItem]
"""In the order of their numbers."""
Writer = Callable[[Path, OutputItems, int, Tiles], None]
"""write(out, results, how many there are, tiles of each)."""


@dataclass(frozen=True)
class OutputFormat:
    """A way to write images."""

    write: Writer
    replaceable: bool = False
    """Whether an existing file is replaced: a picture to look at is, a set of images for others to read is not."""


def write_grid(out: Path, results: OutputItems, count: int, tiles: Tiles) -> None:
    """One picture, as many results in a row as make 8 images; one where a result has several rows."""
    (rows, columns), wide = tiles, np.stack([result.pixels for result in results])
    n, height, width, channels = wide.shape
    cells = torch.from_numpy(wide).view(n, rows, height // rows, columns, width // columns, channels)
    results_per_row = max(1, COLUMNS // columns) if rows == 1 else 1
    pictures.grid(cells.permute(0, 1, 3, 5, 2, 4).flatten(0, 2), out, columns=results_per_row * columns)


def write_folder(out: Path, results: OutputItems, count: int, tiles: Tiles) -> None:
    """000000.png, 000001.png, ..."""
    with atomic_files.new_folder(out) as aside:
        for result in results:
            (aside / png_name(result.number)).write_bytes(encode_png(result.pixels))


def write_npy(out: Path, results: OutputItems, count: int, tiles: Tiles) -> None:
    """One uint8 array (n, H, W, C)."""

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
    """PNGs, stored as they are: they are compressed already."""

    def write(aside: Path) -> None:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
            for result in results:
                member = zipfile.ZipInfo(png_name(result.number))  # dated 1980: the same images give the same bytes
                member.external_attr = 0o644 << 16
                archive.writestr(member, encode_png(result.pixels))

    atomic_files.write_file(out, write)


def write_tar(out: Path, results: OutputItems, count: int, tiles: Tiles) -> None:
    """A WebDataset shard of PNGs; with their classes, in a .json beside each, where the run has classes."""

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
    """Where and how to write `out`. Raises UserError for a name that says nothing of it."""
    path = Path(out)
    if not path.name or path.name == "..":
        raise UserError(f"out={out}: name a file, or a folder in it")
    if out.endswith("/") or path.is_dir():
        return path, FORMATS[""]
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"out={out}: use a name that ends with .png (one picture), .npy, .zip, .tar, or / for a folder")
    return path, FORMATS[path.suffix.lower()]
