"""Images, masks, chunks and records that a command is given: each ends in one line if it is not what it should be."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from memory_support import little_memory
from PIL import Image

from dvae.data.images import Crop, Resize
from dvae.errors import MachineError, UserError
from dvae.inference.generation.chunks import ChunkStore, read_generation_record, read_record
from dvae.inference.generation.edit_tasks import read_mask
from dvae.inference.generation.generation_settings import ImageInputConfig
from dvae.inference.generation.input_images import open_input_images

pytestmark = pytest.mark.timeout(30)
CONFIG: Any = SimpleNamespace(image_size=16, channels=3, crop=Crop.center, resize=Resize.lanczos, label="", classes=[])
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def given(place: Path, **words: Any) -> np.ndarray:
    """All images that images=PLACE gives a run of 16x16, (n, H, W, C)."""
    inputs = open_input_images(ImageInputConfig(run="run", out="x.npy", images=str(place), **words), CONFIG)
    inputs.check(range(len(inputs)))
    return inputs.read(range(len(inputs))).permute(0, 2, 3, 1).numpy()


def npy(path: Path, shape: tuple[int, ...], size: int = 0) -> Path:
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    os.truncate(path, size or path.stat().st_size + 600)
    return path


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array, allow_pickle=True)
    return path


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def link(path: Path, to: str) -> Path:
    path.symlink_to(to)
    return path


def made(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def large(path: Path) -> Path:
    Image.new("1", (8200, 8200)).save(path)
    return path


def unpacked_size(path: Path, size: int) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.png", "w") as file:
        for _ in range(size // 2**20):
            file.write(bytes(2**20))
    return path


CASES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a pipe": (lambda f: pipe(f / "a.png"), "a.png is a pipe, not a file"),
    "a pipe as array": (lambda f: pipe(f / "a.npy"), "not an array of images .is a pipe, not a file"),
    "a pipe as archive": (lambda f: pipe(f / "a.zip"), "a.zip is a pipe, not a file"),
    "zeros": (lambda f: link(f / "a.png", "/dev/zero"), "a.png is a device, not a file"),
    "zeros as array": (lambda f: link(f / "a.npy", "/dev/zero"), "is a device, not a file"),
    "a link to itself": (lambda f: link(f / "a.png", "a.png"), "Too many levels of symbolic links"),
    "a folder as array": (lambda f: (f / "a.npy").mkdir() or f / "a.npy", "is a folder, not a file"),
    "a pipe in a folder": (lambda f: pipe(f / "a.png").parent, "a.png: is a pipe, not a file"),
    "a device in a folder": (lambda f: link(f / "a.png", "/dev/zero").parent, "a.png: is a device, not a file"),
    "a lost link in a folder": (lambda f: link(f / "a.png", "nowhere").parent, "a.png: No such file"),
    "a pipe as manifest": (lambda f: pipe(f / "manifest.json").parent, "manifest.json: is a pipe, .*build the shards"),
    "a device as manifest": (
        lambda f: link(f / "manifest.json", "/dev/zero").parent,
        "is a device, .*build the shards",
    ),
    "an empty manifest": (lambda f: made(f / "manifest.json", b"").parent, "is not valid JSON .*build the shards"),
    "an image of 8200x8200": (lambda f: large(f / "a.png"), "8200x8200 pixels, .*: scale the image down first"),
    "EPS": (lambda f: made(f / "a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n"), "is not an image that can be read"),
    "a zip bomb": (lambda f: unpacked_size(f / "a.zip", 300 * 2**20), "has 314572800 bytes, more than the 268435456"),
    "objects": (lambda f: saved(f / "a.npy", np.array([{}] * 3, dtype=object)), "holds object, not plain numbers"),
    "fractions": (lambda f: saved(f / "a.npy", PIXELS / 255), r"float64 \(3, 16, 16, 3\): use uint8"),
    "no images": (lambda f: saved(f / "a.npy", PIXELS[:0]), r"uint8 \(0, 16, 16, 3\): use uint8"),
    "no pixels": (lambda f: saved(f / "a.npy", PIXELS[:, :0]), "images of 0x16: use 1 to 67108864 pixels"),
    "a negative shape": (lambda f: npy(f / "a.npy", (-3, -16, 16, 3)), "which does not fit its"),
    "a shape of 2**70": (lambda f: npy(f / "a.npy", (2**60, 16, 16, 3)), "which does not fit its"),
    "an image of 30 GB": (
        lambda f: npy(f / "a.npy", (1, 10**5, 10**5, 3), 3 * 10**10 + 200),
        "images of 100000x100000",
    ),
}


@pytest.mark.parametrize("resize", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_images_that_are_none(tmp_path: Path, name: str, resize: bool):
    write, says = CASES[name]
    place = write(tmp_path)
    with little_memory(), pytest.raises(UserError, match=says) as error:
        given(place, resize=resize)
    assert "\n" not in str(error.value)


def test_the_same_images_in_every_form(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    for number, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / "folder" / f"{number}.png")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for path in sorted((tmp_path / "folder").iterdir()):
            archive.write(path, path.name)
    for place in (
        tmp_path / "folder", tmp_path / "x.zip", saved(tmp_path / "a.npy", PIXELS),
        saved(tmp_path / "b.npy", np.asfortranarray(PIXELS)),
    ):  # fmt: skip
        assert np.array_equal(given(place), PIXELS)


MASKS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a pipe": (lambda f: pipe(f / "a.png"), "mask=.*a.png: is a pipe, not a file: name a PNG"),
    "a device": (lambda f: link(f / "a.png", "/dev/zero"), "mask=.*a.png: is a device, not a file: name a PNG"),
    "a folder": (lambda f: f, "mask=.*: is a folder, not a file: name a PNG"),
    "an array": (lambda f: saved(f / "a.npy", PIXELS), "mask=.*a.npy: not an image file"),
    "a large image": (lambda f: large(f / "a.png"), "mask=.*8200x8200 pixels, .*: scale the image down first"),
    "another size": (lambda f: Image.new("L", (8, 8)).save(f / "a.png") or f / "a.png", "is 8x8, the run's images are"),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_are_none(tmp_path: Path, name: str):
    write, says = MASKS[name]
    with little_memory(), pytest.raises(UserError, match=says):
        read_mask(str(write(tmp_path)), 16)


def test_a_folder_does_not_hide_a_mask_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("left").mkdir()
    assert read_mask("left", 16)[:, :8].all()


@pytest.fixture
def chunks(tmp_path: Path) -> ChunkStore:
    """A chunk of the images 0 to 15."""
    made = ChunkStore(tmp_path)
    made.write(range(16), {"pixels": np.zeros((16, 4, 4, 3), np.uint8), "nfe": np.arange(16)})
    return made


def test_a_chunk_is_read_as_it_was_written(chunks: ChunkStore):
    assert chunks.read(range(16), "pixels", 16).shape == (16, 4, 4, 3)
    assert chunks.read(range(16), "nfe").tolist() == list(range(16))


SPOILED: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_bytes(b"nothing"),
    "nothing": lambda path: path.write_bytes(b""),
    "cut": lambda path: os.truncate(path, 300),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "zeros": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "another array": lambda path: np.savez(path, other=np.arange(16)),
    "too few rows": lambda path: np.savez(path, nfe=np.arange(15)),
    "too many rows": lambda path: np.savez(path, nfe=np.arange(17)),
    "no rows": lambda path: np.savez(path, nfe=np.array(16)),
    "objects": lambda path: np.savez(path, nfe=np.array([{}] * 16, dtype=object)),
    "compressed zeros": lambda path: np.savez_compressed(path, nfe=np.zeros((16, 10**7), np.uint8)),
    "an array of Python": lambda path: path.write_bytes(b"\x80\x04cos\nsystem\n."),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_chunk_that_is_none(chunks: ChunkStore, name: str):
    path = chunks.path(range(16))
    SPOILED[name](path)
    says = rf"{path.name} is damaged \(.*\): remove it, then run the same command again"
    with little_memory(), pytest.raises(MachineError, match=says) as error:
        chunks.read(range(16), "nfe", 16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [
    "", "[]", "7", '{"a": 1, "a": 2}', "[" * 10**5, '{"n": 1}', '{"request": [], "n": 1, "nfe": 2, "versions": {}}',
    '{"request": {}, "n": 1.5, "nfe": 2, "versions": {}}', '{"request": {}, "n": 1, "nfe": 2, "versions": {}, "x": 1}',
])  # fmt: skip
def test_a_record_that_is_none(tmp_path: Path, text: str):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json: not a record of what was drawn \(.*\): remove it"):
        read_generation_record(tmp_path / "x.json")
    if not text.startswith('{"n"') and "request" not in text:
        with pytest.raises(UserError, match=r"x\.json: not a record of what was drawn \(.*\): remove it"):
            read_record(tmp_path / "x.json")


@pytest.mark.parametrize("name", ["a pipe", "a folder", "zeros"])
def test_a_request_that_is_no_file(tmp_path: Path, name: str):
    out = tmp_path / "x.npy"
    folder = ChunkStore.folder_of(out)
    folder.mkdir()
    (folder / "request.json").touch()
    SPOILED[name](folder / "request.json")
    with pytest.raises(UserError, match=r"request\.json: not a record"), ChunkStore.opened(out, {"seed": 0}):
        pass
