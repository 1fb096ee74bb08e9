"""What images are written as: chosen by the name of the result. Every writer leaves it complete or absent."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dvae import files
from dvae.data.images import encode_png
from dvae.data.tars import ShardWriter
from dvae.errors import UserError
from dvae.tracking import pictures

MOST_IN_A_GRID = 1024
Images = Iterator[tuple[int, np.ndarray]]
"""(number, pixels (H, W, C) uint8) in the order of the numbers; with the VAE's samples W is that of two images."""
Write = Callable[[Path, Images, int, int], None]
"""write(out, images, how many there are, images side by side in the pixels of each)."""


@dataclass(frozen=True)
class Format:
    """A way to write images."""

    write: Write
    whole: bool = True
    """Whether it holds images for others to read, and so is not replaced; a picture is to be looked at."""


def grid(out: Path, images: Images, count: int, shown: int) -> None:
    """One picture, 8 images a row."""
    wide = np.stack([pixels for _, pixels in images])
    n, height, width, channels = wide.shape
    apart = torch.from_numpy(wide).view(n, height, shown, width // shown, channels).permute(0, 2, 4, 1, 3)
    pictures.grid(apart.flatten(0, 1), out)


def folder(out: Path, images: Images, count: int, shown: int) -> None:
    """000000.png, 000001.png, ..."""
    with files.new_folder(out) as aside:
        for number, pixels in images:
            (aside / png_name(number)).write_bytes(encode_png(pixels))


def npy(out: Path, images: Images, count: int, shown: int) -> None:
    """One uint8 array (n, H, W, C)."""

    def write(aside: Path) -> None:
        array: np.ndarray | None = None
        for row, (_, pixels) in enumerate(images):
            if array is None:
                array = np.lib.format.open_memmap(aside, "w+", np.uint8, (count, *pixels.shape))
            array[row] = pixels
        assert isinstance(array, np.memmap)
        array.flush()

    files.write_file(out, write)


def zipped(out: Path, images: Images, count: int, shown: int) -> None:
    """PNGs, stored as they are: they are compressed already."""

    def write(aside: Path) -> None:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_STORED) as archive:
            for number, pixels in images:
                member = zipfile.ZipInfo(png_name(number))  # dated 1980: the same images give the same bytes
                member.external_attr = 0o644 << 16
                archive.writestr(member, encode_png(pixels))

    files.write_file(out, write)


def tar(out: Path, images: Images, count: int, shown: int) -> None:
    """A WebDataset shard of PNGs."""

    def write(aside: Path) -> None:
        shard = ShardWriter(aside)
        for number, pixels in images:
            shard.write(number, {"png": encode_png(pixels)})
        shard.close()

    files.write_file(out, write)


def png_name(number: int) -> str:
    return f"{number:06d}.png"


FORMATS = {
    ".png": Format(grid, whole=False),
    ".npy": Format(npy),
    ".zip": Format(zipped),
    ".tar": Format(tar),
    "": Format(folder),
}


def of(out: str) -> tuple[Path, Format]:
    """Where and how to write `out`. Raises UserError for a name that says nothing of it."""
    path = Path(out)
    if not path.name or path.name == "..":
        raise UserError(f"out={out}: name a file, or a folder in it")
    if out.endswith("/") or path.is_dir():
        return path, FORMATS[""]
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"out={out}: use a name that ends with .png (one picture), .npy, .zip, .tar, or / for a folder")
    return path, FORMATS[path.suffix.lower()]
