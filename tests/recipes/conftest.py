"""A few images in the layout of each published data set, for the recipes that ask for one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CIFAR = ["data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin"]
COUNT = 12
"""Images of each data set, about."""


def face(path: Path, seed: int, width: int, height: int) -> None:
    """A picture of a few colored blocks, which JPEG makes small."""
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((width, height), Image.Resampling.BILINEAR).save(path)


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """source.path by name of the source; the images have the size that the recipes need at least."""
    root = tmp_path_factory.mktemp("published")
    draw = np.random.default_rng(0)
    for name in CIFAR:
        rows = draw.integers(0, 256, (3, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        (root / "cifar10" / "cifar-10-batches-bin").mkdir(parents=True, exist_ok=True)
        (root / "cifar10" / "cifar-10-batches-bin" / name).write_bytes(rows.tobytes())
    for i in range(COUNT):
        face(root / "celeba" / "img_align_celeba" / f"{i + 1:06d}.jpg", i, 178, 218)
        face(root / "celebahq" / "CelebA-HQ-img" / f"{i}.jpg", i, 256, 256)
        face(root / "ffhq" / "thumbnails128x128" / "00000" / f"{i:05d}.png", i, 128, 128)
        animal = ("cat", "dog", "wild")[i % 3]
        face(root / "afhq" / "train" / animal / f"flickr_{animal}_{i:06d}.png", i, 256, 256)
        face(root / "afhq" / "test" / animal / f"flickr_{animal}_{i:06d}.png", 100 + i, 256, 256)
    return {folder.name: str(folder) for folder in root.iterdir()}
