"""Grids of images as PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dvae.utils import atomic_files


def grid(images: torch.Tensor, path: Path, columns: int = 8, scale: int = 1, pad: int = 1) -> None:
    """Write images as one PNG file, row by row from the top left.

    The file is replaced in one rename. Empty cells of the last row are transparent.

    Args:
        images: uint8 tensor (N, C, H, W) with C = 1 or 3.
        path: The PNG file.
        columns: Images per row.
        scale: Each pixel is drawn as scale x scale pixels.
        pad: Transparent pixels between two images.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"images are {tuple(images.shape)} {images.dtype}: want (N, 1 or 3, H, W) uint8, N >= 1")
    color = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images
    pixels = color.permute(0, 2, 3, 1).cpu().numpy().repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, _ = pixels.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    sheet = np.zeros((rows * (height + pad) - pad, columns * (width + pad) - pad, 4), dtype=np.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (height + pad), (i % columns) * (width + pad)
        sheet[top : top + height, left : left + width] = np.concatenate(
            [image, np.full((height, width, 1), 255, dtype=np.uint8)], axis=2
        )
    atomic_files.write_file(path, lambda aside: Image.fromarray(sheet).save(aside, format="PNG"))
