"""Reading sets of images: every form holds the same ones; mistakes are one line."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dvae.errors import UserError
from dvae.evaluation.image_sets import ImageArray, open_image_set, require_same_size

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def forms(tmp_path: Path) -> list[Path]:
    """The same images as a folder, a zip file, a tar file and an array; out of order where there are names."""
    names = [f"{number}.png" for number in range(5)]
    order = [3, 0, 4, 2, 1]
    (tmp_path / "folder").mkdir()
    for k in order:
        (tmp_path / "folder" / names[k]).write_bytes(png(PIXELS[k]))
    (tmp_path / "folder" / "notes.txt").write_text("no image")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for k in order:
            archive.writestr(f"in/{names[k]}", png(PIXELS[k]))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for k in order:
            item = tarfile.TarInfo(names[k])
            item.size = len(png(PIXELS[k]))
            tar.addfile(item, io.BytesIO(png(PIXELS[k])))
    np.save(tmp_path / "x.npy", PIXELS)
    return [tmp_path / name for name in ("folder", "x.zip", "x.tar", "x.npy")]


def test_every_form_holds_the_same_images(forms: list[Path]) -> None:
    expected = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    sets = [open_image_set("images", str(path)) for path in forms]
    for images in sets:
        assert len(images) == 5
        assert images.size() == (6, 8)
        assert torch.equal(images.read(0, 5), expected)
        assert torch.equal(images.read(2, 4), expected[2:4])
    assert len({images.sha256() for images in sets}) == 1
    some = open_image_set("images", str(forms[0]), most=3)
    assert torch.equal(some.read(0, 3), expected[[0, 2, 4]])
    assert some.sha256() != sets[0].sha256()


def test_one_of_two_images_side_by_side(tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.concatenate([PIXELS, 255 - PIXELS], 2))
    left, right = (ImageArray(str(tmp_path / "wide.npy"), 2, which).read(0, 5) for which in (0, 1))
    assert torch.equal(left, torch.from_numpy(PIXELS).permute(0, 3, 1, 2))
    assert torch.equal(right, 255 - left)


def test_gray_images_are_three_times_over(tmp_path: Path) -> None:
    np.save(tmp_path / "gray.npy", PIXELS[..., :1])
    images = open_image_set("images", str(tmp_path / "gray.npy")).read(0, 2)
    assert images.shape == (2, 3, 6, 8)
    assert torch.equal(images[:, 0], images[:, 2])


def test_mistakes(tmp_path: Path) -> None:
    def refused(place: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            open_image_set("images", str(place)).sha256()

    refused(tmp_path / "nowhere", "images=.*nowhere: no such file or folder")
    folder = tmp_path / "folder"
    folder.mkdir()
    refused(folder, "images=.*folder: holds no PNG or JPEG file")
    (folder / "a.png").write_bytes(png(PIXELS[0]))
    (folder / "b.png").write_bytes(png(PIXELS[0][:4]))
    refused(folder, r"images of different sizes, a\.png is 6x8, b\.png is 4x8: resize them to one size")
    (folder / "b.png").write_bytes(b"no image")
    refused(folder, r"b\.png cannot be read")
    Image.fromarray(np.zeros((6, 8), dtype=np.uint16)).save(folder / "b.png")
    refused(folder, r"b\.png has more than 8 bits a channel")
    (folder / "b.png").rename(folder / "b.webp")
    refused(folder, r"b\.webp would be skipped: save it as PNG")
    (tmp_path / "x.gif").write_bytes(b"")
    refused(tmp_path / "x.gif", "name shards, a folder of PNG or JPEG files, or a .zip, .tar or .npy file")
    (tmp_path / "x.zip").write_bytes(b"nothing")
    refused(tmp_path / "x.zip", r"x\.zip: cannot be read")
    np.save(tmp_path / "float.npy", np.zeros((2, 3, 3, 3)))
    refused(tmp_path / "float.npy", r"float64 \(2, 3, 3, 3\): want uint8")


def test_two_sets_of_unlike_size(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", PIXELS)
    np.save(tmp_path / "b.npy", PIXELS[:, :4])
    a, b = (open_image_set("images", str(tmp_path / name)) for name in ("a.npy", "b.npy"))
    require_same_size(a, a)
    with pytest.raises(UserError, match=r"has images of 6x8, .*b\.npy of 4x8: resize them to one size first"):
        require_same_size(a, b)
