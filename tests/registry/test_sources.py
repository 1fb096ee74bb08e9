"""Sources: avatars, folder, zip, idx, on files laid out as the real ones are."""

from __future__ import annotations

import gzip
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dvae.data.images import DamagedImage
from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.sources.avatars import AvatarStyle, _definition
from dvae.registry.sources.base import SOURCES, Source

LOOKS = [look.name for look in AvatarStyle]


def make(size: int = 16, channels: int = 3, **node: object) -> Source:
    return SOURCES.build(node, Shapes(image_size=size, channels=channels))


def picture(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (20, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)


def idx(path: Path, array: np.ndarray, magic: bytes | None = None) -> str:
    header = magic or bytes([0, 0, 8, array.ndim])
    data = header + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


@pytest.mark.parametrize("look", LOOKS)
def test_avatars_of_every_style(look: str):
    faces = make(32, name="avatars", style=look, n=4)
    items = [faces[i] for i in range(len(faces))]
    assert [item.key for item in items] == ["0-0", "0-1", "0-2", "0-3"]
    for item in items:
        assert item.image.shape == (32, 32, 3)
        assert item.image.dtype == np.uint8
        assert item.image.std() > 10
    assert len({item.image.tobytes() for item in items}) == 4
    assert "licensed under" in faces.license


def test_avatar_labels_are_what_is_drawn():
    faces = make(32, name="avatars", n=40)
    items = [faces[i] for i in range(40)]
    for item in items:
        background = tuple(int(str(item.labels["background_color"])[i : i + 2], 16) for i in (1, 3, 5))
        assert np.abs(item.image[0, 0].astype(int) - background).max() <= 2 or item.labels["hair"] in ("spiky", "bun")
        assert set(item.labels) == set(items[0].labels)
    for part in ("hair", "mouth", "eyes", "eyebrows", "beard", "rearHair", "skin_color", "hair_color"):
        assert len({item.labels[part] for item in items}) > 1
    assert "none" in {item.labels["beard"] for item in items}


def test_avatars_are_stable_and_seeds_differ():
    first, again, other = (make(16, name="avatars", seed=seed)[7] for seed in (0, 0, 1))
    assert np.array_equal(first.image, again.image)
    assert first.labels == again.labels
    assert not np.array_equal(first.image, other.image)


def test_gray_avatars():
    assert make(16, 1, name="avatars")[0].image.shape == (16, 16, 1)


def test_avatars_without_dicebear(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "dicebear", None)
    _definition.cache_clear()
    with pytest.raises(UserError, match=r"pip install dicebear-core"):
        make(name="avatars")
    _definition.cache_clear()


@pytest.mark.parametrize(
    ("node", "says"),
    [
        ({"n": 0}, "n=0"),
        ({"background": ["red"]}, "red"),
        ({"background": []}, "one or more colors"),
        ({"style": "toonhead"}, "style"),
    ],
)
def test_avatars_refuse(node: dict, says: str):
    with pytest.raises(UserError, match=says):
        make(name="avatars", **node)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The layout of AFHQ: a folder for each class, with other files about."""
    root = tmp_path / "afhq"
    picture(root / "dog" / "2.jpg", (0, 0, 250))
    picture(root / "cat" / "10.png", (250, 0, 0))
    picture(root / "cat" / "9.v2.webp", (0, 250, 0))
    (root / "README.txt").write_text("hello")
    (root / "cat" / "._10.png").write_bytes(b"resource fork")
    return root


def zipped(folder: Path) -> Path:
    path = folder.parent / "pictures.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


@pytest.mark.parametrize("name", ["folder", "zip"])
def test_pictures_are_read_in_order_with_their_folder(pictures: Path, name: str):
    images = make(name=name, path=str(pictures if name == "folder" else zipped(pictures)), license="CC BY 4.0")
    items = [images[i] for i in range(len(images))]
    assert [item.key for item in items] == ["cat/10.png", "cat/9.v2.webp", "dog/2.jpg"]
    assert [item.labels for item in items] == [{"folder": "cat"}, {"folder": "cat"}, {"folder": "dog"}]
    assert [int(item.image.mean((0, 1)).argmax()) for item in items] == [0, 1, 2]
    assert images.license == "CC BY 4.0"
    assert "Lanczos" in images.protocol


def test_a_flat_folder_has_no_labels(tmp_path: Path):
    """The layout of CelebA."""
    picture(tmp_path / "000001.jpg", (9, 9, 9), (178, 218))
    item = make(64, name="folder", path=str(tmp_path))[0]
    assert (item.key, item.labels, item.image.shape) == ("000001.jpg", {}, (64, 64, 3))


def test_an_undecodable_file_name(tmp_path: Path):
    picture(tmp_path / "a.png", (9, 9, 9))
    (tmp_path / "a.png").rename(tmp_path / b"\xff\xfe.png".decode("utf-8", "surrogateescape"))
    assert make(name="folder", path=str(tmp_path))[0].key == "\\udcff\\udcfe.png"


@pytest.mark.parametrize("name", ["folder", "zip"])
def test_one_damaged_picture_is_named(pictures: Path, name: str):
    (pictures / "cat" / "broken.png").write_bytes(b"not a picture")
    images = make(name=name, path=str(pictures if name == "folder" else zipped(pictures)))
    with pytest.raises(DamagedImage, match=r"cat/broken\.png"):
        images[2]
    assert images[0].key == "cat/10.png"


def test_a_damaged_member_of_a_zip(pictures: Path):
    path = zipped(pictures)
    info = zipfile.ZipFile(path).getinfo("cat/10.png")
    data = bytearray(path.read_bytes())
    data[info.header_offset + 60] ^= 255
    path.write_bytes(data)
    with pytest.raises(DamagedImage, match=r"cat/10\.png"):
        make(name="zip", path=str(path))[0]


def test_folders_that_cannot_be(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    for path, says in (
        ("nowhere", "does not exist"),
        ("empty", "it is empty"),
        ("text", "1 other files, such as a.txt"),
    ):
        with pytest.raises(UserError, match=says):
            make(name="folder", path=str(tmp_path / path))
    with pytest.raises(UserError, match="is not a folder"):
        make(name="folder", path=str(tmp_path / "text" / "a.txt"))
    with pytest.raises(UserError, match=r"source\.path"):
        make(name="folder")


def test_archives_that_cannot_be(tmp_path: Path):
    (tmp_path / "text.zip").write_text("hello")
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("a.txt", "x")
    for path, says in (
        ("nowhere.zip", "does not exist"),
        ("text.zip", "not a readable zip"),
        ("none.zip", "no images"),
    ):
        with pytest.raises(UserError, match=says):
            make(name="zip", path=str(tmp_path / path))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_as_mnist_has_it(tmp_path: Path, suffix: str):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), dtype=np.uint8)
    labels = np.array([7, 2, 1, 0, 4], np.uint8)
    source = make(
        28,
        1,
        name="idx",
        images=idx(tmp_path / f"train-images-idx3-ubyte{suffix}", images),
        labels=idx(tmp_path / f"train-labels-idx1-ubyte{suffix}", labels),
    )
    assert len(source) == 5
    assert np.array_equal(source[2].image[:, :, 0], images[2])
    assert [source[i].labels["label"] for i in range(5)] == labels.tolist()
    assert source[2].key == "0000002"


def test_idx_to_another_size_and_color(tmp_path: Path):
    source = make(32, 3, name="idx", images=idx(tmp_path / "i", np.full((2, 28, 28), 99, np.uint8)))
    assert source[1].image.shape == (32, 32, 3)
    assert (source[1].image == 99).all()
    assert source[1].labels == {}


def test_idx_that_cannot_be(tmp_path: Path):
    images = np.zeros((3, 4, 4), np.uint8)
    good = idx(tmp_path / "good", images)
    (tmp_path / "cut").write_bytes(Path(good).read_bytes()[:-1])
    (tmp_path / "cut.gz").write_bytes(gzip.compress(Path(good).read_bytes())[:-9])
    (tmp_path / "void").write_bytes(b"")
    wrong = {
        str(tmp_path / "nowhere"): "does not exist",
        idx(tmp_path / "magic", images, b"PK\x03\x04"): "not an IDX file of unsigned bytes: it begins with 0x504b0304",
        idx(tmp_path / "floats", images, b"\0\0\x0d\x03"): "not an IDX file of unsigned bytes",
        str(tmp_path / "void"): "not an IDX file",
        str(tmp_path / "cut"): "63 bytes long, its header says 64|header says",
        str(tmp_path / "cut.gz"): "cannot be read",
        idx(tmp_path / "flat", np.zeros(3, np.uint8)): "must be",
        idx(tmp_path / "none", np.zeros((0, 4, 4), np.uint8)): "holds no images",
    }
    for path, says in wrong.items():
        with pytest.raises(UserError, match=says):
            make(name="idx", images=path)
    with pytest.raises(UserError, match="there are 3 images"):
        make(name="idx", images=good, labels=idx(tmp_path / "l", np.zeros(4, np.uint8)))


def test_every_source_can_be_pickled(pictures: Path, tmp_path: Path):
    made = [
        make(name="avatars"),
        make(name="folder", path=str(pictures)),
        make(name="zip", path=str(zipped(pictures))),
        make(name="idx", images=idx(tmp_path / "i", np.zeros((2, 4, 4), np.uint8))),
    ]
    for source in made:
        before = source[0]
        copy = pickle.loads(pickle.dumps(source))
        assert len(copy) == len(source)
        assert copy[0].key == before.key
        assert np.array_equal(copy[0].image, before.image)
