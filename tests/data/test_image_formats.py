"""Which image files are opened: by their content, of a bounded size, and no program is ever started for them."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hostile_files import BOMB, EPS, FIRST, SCANS, chunk, header, png
from hostile_images import large_png, tiled, webp
from memory_support import little_memory
from PIL import Image

from dvae.data.image_tree import FolderTree
from dvae.data.images import PIXELS, DamagedImage, decode, decode_png, encode_png, open_image, png_limit

SCRIPT = """
import io, pathlib, sys
from dvae.data.images import DamagedImage, decode  # may start something while it is imported
started = []
sys.addaudithook(lambda event, _: started.append(event) if event in ("subprocess.Popen", "os.posix_spawn") else None)
from PIL import Image
data = pathlib.Path(sys.argv[1]).read_bytes()
if sys.argv[2] == "pillow":
    try:
        Image.open(io.BytesIO(data)).load()
    except OSError:
        pass  # what the program wrote is no picture
else:
    try:
        decode(data, "a.png")
    except DamagedImage as error:
        print(error)
print(len(started))
"""


@pytest.mark.parametrize(("who", "says"), [("dvae", ["a.png: not an image file", "0"]), ("pillow", None)])
def test_ghostscript_is_not_started_for_eps_that_is_called_png(tmp_path: Path, who: str, says: list[str] | None):
    """The second row shows that plain Pillow starts it, so the first one can fail."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "gs"
    program.write_text(f"#!/bin/sh\necho started >> {tmp_path}/mark\necho 10.0\n")
    program.chmod(0o755)
    (tmp_path / "a.png").write_bytes(EPS)
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "a.png"), who],
        env=environment, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert (tmp_path / "mark").exists() == (who == "pillow")
    if says:
        assert done.stdout.splitlines() == says
    else:
        assert int(done.stdout.splitlines()[-1]) > 0


@pytest.mark.parametrize("kind", ["DDS", "TGA", "PCX", "SGI"])
def test_other_formats_are_no_images(tmp_path: Path, kind: str):
    """Pillow reads them; dvae's sources name the formats that it reads."""
    Image.fromarray(FIRST).save(tmp_path / "a.png", kind)
    assert Image.open(tmp_path / "a.png").size == (8, 8)
    with pytest.raises(DamagedImage, match=r"^a\.png: not an image file$"):
        decode((tmp_path / "a.png").read_bytes(), "a.png")


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "PPM"])
def test_the_rarer_formats_are_read(tmp_path: Path, kind: str):
    Image.fromarray(FIRST).save(tmp_path / "a.png", kind)
    assert decode((tmp_path / "a.png").read_bytes(), "a.png").size == (8, 8)


def test_a_photograph_of_two_pictures_is_read(tmp_path: Path):
    """Telephones write MPO files and call them .jpg."""
    pictures = [Image.fromarray(FIRST), Image.fromarray(255 - FIRST)]
    pictures[0].save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=pictures[1:])
    assert open_image((tmp_path / "a.jpg").read_bytes(), "a.jpg").format == "MPO"
    assert decode((tmp_path / "a.jpg").read_bytes(), "a.jpg").size == (8, 8)


@pytest.mark.parametrize(("data", "says"), [
    (BOMB, r"^a: more than 67108864 pixels: scale the image down first$"),
    (large_png(), r"^a: 8200x8200 pixels, at most 67108864 are decoded: scale the image down first$"),
    (tiled(65536), r"^a: 65536x65536 pixels, at most 67108864 are decoded: scale the image down first$"),
    (webp(16384, 16384), r"^a: "),
])  # fmt: skip
def test_too_many_pixels_are_refused_by_the_header(data: bytes, says: str):
    with little_memory(), warnings.catch_warnings(record=True) as said, pytest.raises(DamagedImage, match=says):
        decode(data, "a")
    assert not said


def test_the_largest_image_is_read():
    side = 8192
    data = Image.new("1", (side, side)).tobytes()
    image = decode(b"P4 %d %d\n" % (side, side) + data, "a")
    assert image.width * image.height == PIXELS


def test_a_png_is_checked_by_its_header_before_memory_is_taken():
    shape = (3, 50_000, 50_000)
    with little_memory(), pytest.raises(DamagedImage, match=r"^shape \(3, 50000, 50000\), not \(3, 8, 8\)$"):
        decode_png(BOMB, (3, 8, 8))
    with little_memory(), pytest.raises(DamagedImage, match=r"^its pixels do not match its header$"):
        decode_png(BOMB, shape)  # a million bytes for 7.5 billion


def test_only_what_pixels_need_reaches_the_decoder():
    beside = [chunk(b"tRNS", bytes(6)), chunk(b"iCCP", b"a\0\0nonsense"), chunk(b"ABCD", b"of no known kind")]
    assert np.array_equal(decode_png(png(header(8, 8), *beside, SCANS), (3, 8, 8)).permute(1, 2, 0), FIRST)


def test_noise_is_never_larger_than_a_png_may_be():
    for channels in (1, 3):
        for side in (1, 8, 256):
            pixels = np.random.default_rng(0).integers(0, 256, (side, side, channels), dtype=np.uint8)
            assert len(encode_png(pixels)) < png_limit((channels, side, side))


def test_special_files_in_a_folder_are_named(tmp_path: Path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    (tmp_path / "c.png").symlink_to("c.png")
    (tmp_path / "d.png").mkdir()
    (tmp_path / "e.png").write_bytes(b"")
    os.truncate(tmp_path / "e.png", 2**40)
    tree = FolderTree(str(tmp_path))
    assert tree.names == ["a.png", "b.png", "c.png", "e.png"]
    for name, says in {
        "a.png": "is a pipe, not a file", "b.png": "is a device, not a file", "c.png": "Too many levels",
        "e.png": "has 1099511627776 bytes, more than the 268435456",
    }.items():  # fmt: skip
        with pytest.raises(DamagedImage, match=f"{name}: {says}"):
            tree.read(name)
