"""Sources of published data sets, on files that these tests write in the layouts of the real ones."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torchvision.transforms import Resize as TorchvisionResize

from dvae.config.compose import compose
from dvae.data.building import shards_settings as _schema  # noqa: F401 stores the schema that presets are composed into
from dvae.data.building.shard_build import build
from dvae.data.images import DamagedImage, encode_png
from dvae.data.shards.reader import Shards
from dvae.data.shards.verify import verify
from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.sources.base import SOURCES, Source
from dvae.registry.sources.cifar10 import CLASSES


def make(size: int = 16, channels: int = 3, **node: object) -> Source:
    return SOURCES.build(node, Shapes(image_size=size, channels=channels))


def noise(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def picture(path: Path, seed: int, width: int, height: int) -> np.ndarray:
    """Write a picture; returns its pixels as a reader of the file sees them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed, height, width)).save(path, **({"quality": 95} if path.suffix == ".jpg" else {}))
    return np.asarray(Image.open(path))


def zipped(folder: Path, name: str) -> str:
    path = folder.parent / name
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, Path(folder.name) / file.relative_to(folder))
    return str(path)


# CIFAR-10


def short(value: bytes) -> bytes:
    """A byte string as Python 2's pickle wrote it: U (up to 255 bytes) or T."""
    return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    return b"K" + bytes([value]) if value < 256 else b"M" + struct.pack("<H", value)


def batch_pickle(images: np.ndarray, labels: list[int], array: bytes | None = None) -> bytes:
    """A batch as the published archive holds it: protocol 2, by Python 2, the array through numpy's _reconstruct."""
    dtype = (
        b"cnumpy\ndtype\n" + short(b"u1") + b"K\x00K\x01\x87R(K\x03" + short(b"|") + b"NNN" + 2 * b"J\xff\xff\xff\xff"
    )
    dtype += b"K\x00tb"
    state = b"(K\x01" + number(len(images)) + number(3072) + b"\x86" + dtype + b"\x89" + short(images.tobytes()) + b"tb"
    rebuild = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short(b"b") + b"\x87R"
    items = [
        short(b"batch_label") + short(b"training batch 1 of 5"),
        short(b"labels") + b"](" + b"".join(number(label) for label in labels) + b"e",
        short(b"data") + (rebuild + state if array is None else array),
        short(b"filenames") + b"](" + b"".join(short(b"frog_s_%06d.png" % i) for i in range(len(labels))) + b"e",
    ]
    return b"\x80\x02}(" + b"".join(items) + b"u."


NAMES = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]


def batches(count: int = 4) -> dict[str, tuple[np.ndarray, list[int]]]:
    draw = np.random.default_rng(0)
    return {
        name: (draw.integers(0, 256, (count, 3072), dtype=np.uint8), draw.integers(0, 10, count).tolist())
        for name in NAMES
    }


def cifar_files(kind: str) -> dict[str, bytes]:
    """The files of either archive, by their path in it."""
    if kind == "python":
        files = {f"cifar-10-batches-py/{name}": batch_pickle(*batch) for name, batch in batches().items()}
        return files | {"cifar-10-batches-py/batches.meta": b"\x80\x02}.", "cifar-10-batches-py/readme.html": b"<html>"}
    rows = {
        name: b"".join(bytes([label]) + image.tobytes() for image, label in zip(*batch, strict=True))
        for name, batch in batches().items()
    }
    return {f"cifar-10-batches-bin/{name}.bin": data for name, data in rows.items()}


def archive(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def unpacked(path: Path, files: dict[str, bytes]) -> str:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return str(path)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", ["python", "binary"])
def test_cifar10_in_all_its_forms(tmp_path: Path, kind: str, packed: bool):
    files = cifar_files(kind)
    path = archive(tmp_path / f"cifar-10-{kind}.tar.gz", files) if packed else unpacked(tmp_path / "data", files)
    for split, names in (("train", NAMES[:5]), ("test", NAMES[5:]), ("all", NAMES)):
        source = make(32, name="cifar10", path=path, split=split)
        assert len(source) == 4 * len(names)
        for index in range(len(source)):
            images, labels = batches()[names[index // 4]]
            item = source[index]
            assert np.array_equal(item.image.transpose(2, 0, 1).reshape(-1), images[index % 4])  # red, green, blue
            assert item.labels == {"class": CLASSES[labels[index % 4]]}
            assert item.key == f"{names[index // 4]}/{index % 4:05d}"
        assert split in source.protocol
    assert make(16, 1, name="cifar10", path=path)[0].image.shape == (16, 16, 1)
    assert "Lanczos" in make(16, name="cifar10", path=path).protocol


def test_the_fixture_is_what_numpy_reads():
    """What the tests take for a published batch, an ordinary unpickler takes for one too."""
    images, labels = batches()["test_batch"]
    read = pickle.loads(batch_pickle(images, labels), encoding="bytes")
    assert np.array_equal(read[b"data"], images)
    assert (read[b"labels"], read[b"filenames"][1]) == (labels, b"frog_s_000001.png")


class Malicious:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self):
        return os.system, (self.code,)


def hostile(kind: str, mark: Path) -> bytes:
    code = f"touch {mark}"
    if kind == "reduce":
        return pickle.dumps({b"labels": [1], b"data": Malicious(code)}, 2)
    if kind == "global":
        return b"\x80\x02cposix\nsystem\n" + short(code.encode()) + b"\x85R."
    if kind == "stack_global":
        return b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c\x01x\x85R."
    if kind == "inst":
        return b"(S'" + code.encode() + b"'\nios\nsystem\n."
    if kind == "attribute":
        return b"\x80\x04\x8c\x05numpy\x8c\x12ndarray.__reduce__\x93."
    images, labels = batches()["test_batch"]
    inside = {"save": b"cnumpy\nsave\n)R", "eval": b"c__builtin__\neval\n" + short(b"1") + b"\x85R"}[kind]
    return batch_pickle(images, labels, array=inside)


@pytest.mark.parametrize("kind", ["reduce", "global", "stack_global", "inst", "attribute", "save", "eval"])
def test_a_batch_that_would_execute_something_is_refused(tmp_path: Path, kind: str):
    files = cifar_files("python")
    mark = tmp_path / "executed"
    files["cifar-10-batches-py/data_batch_3"] = hostile(kind, mark)
    with pytest.raises(UserError, match=r"data_batch_3 names \S+, which no batch of CIFAR-10 needs") as error:
        make(32, name="cifar10", path=unpacked(tmp_path / "data", files))
    assert "\n" not in str(error.value)
    assert not mark.exists()


def test_described_things_do_nothing(tmp_path: Path):
    """The three names that are let through cannot be turned into something else, or allocate what they name."""
    images, labels = batches()["test_batch"]
    wrong = {
        b"cnumpy\nndarray\n(J\xff\xff\xff\x7ftR": "data of ndarray(2147483647)",
        b"cnumpy\ndtype\n(X\x01\x00\x00\x00OtR": "an object dtype",
        b"cnumpy.core.multiarray\n_reconstruct\n(tR}(U\x08__class__K\x01ub": "a state that would set attributes",
        b"K\x07": "a number",
        b"N": "nothing",
    }
    for array, what in wrong.items():
        files = cifar_files("python")
        files["cifar-10-batches-py/data_batch_1"] = batch_pickle(images, labels, array)
        with pytest.raises(UserError, match="data_batch_1 is not a batch of CIFAR-10"):
            make(32, name="cifar10", path=unpacked(tmp_path / "data", files)), what


def test_cifar10_that_cannot_be(tmp_path: Path):
    good, binary = cifar_files("python"), cifar_files("binary")
    first, second = "cifar-10-batches-py/data_batch_1", "cifar-10-batches-bin/data_batch_2.bin"
    whole = archive(tmp_path / "whole.tar.gz", good)
    (tmp_path / "cut.tar.gz").write_bytes(Path(whole).read_bytes()[:-2000])
    (tmp_path / "text.tar.gz").write_text("hello")
    images, labels = batches()["test_batch"]
    wrong = {
        str(tmp_path / "nowhere.tar.gz"): "does not exist: name cifar-10-python.tar.gz",
        str(tmp_path / "cut.tar.gz"): "cannot be read as a tar archive",
        str(tmp_path / "text.tar.gz"): "cannot be read as a tar archive",
        unpacked(tmp_path / "other", {"a.txt": b""}): "holds no batches of CIFAR-10",
        unpacked(tmp_path / "lack", {k: v for k, v in good.items() if "batch_4" not in k}): "lacks data_batch_4",
        unpacked(tmp_path / "odd", {**binary, second: binary[second][:-1]}): "data_batch_2.bin is 12291 bytes long",
        unpacked(tmp_path / "short", {**binary, second: binary[second][:-3073]}): r"batches of \[3, 4\] images",
        unpacked(tmp_path / "label", {**binary, second: b"\x0a" + binary[second][1:]}): "labels must be 0 to 9",
        unpacked(tmp_path / "pickle", {**good, first: good[first][:5000]}): "data_batch_1 is not a batch",
        unpacked(tmp_path / "fewer", {**good, first: batch_pickle(images, labels[:3])}): "for 3 labels",
    }
    for path, says in wrong.items():
        with pytest.raises(UserError, match=says) as error:
            make(32, name="cifar10", path=path)
        assert "\n" not in str(error.value)


# CelebA

ATTRIBUTES = ["5_o_Clock_Shadow", "Eyeglasses", "Smiling"]


def attribute_list(path: Path, files: list[str], values: np.ndarray) -> str:
    lines = [f"{file} " + " ".join(f"{v:2d}" for v in row) for file, row in zip(files, values, strict=True)]
    path.write_text("\n".join([str(len(files)), " ".join(ATTRIBUTES) + " ", *lines]) + "\n")
    return str(path)


@pytest.fixture
def celeba(tmp_path: Path) -> Path:
    for i in range(1, 4):
        picture(tmp_path / "img_align_celeba" / f"{i:06d}.jpg", i, 178, 218)
    return tmp_path / "img_align_celeba"


@pytest.mark.parametrize(
    ("crop", "box"),
    [
        ("squash", (0, 0, 178, 218)),
        ("center_140", (19, 39, 159, 179)),
        ("center_148", (15, 35, 163, 183)),
        ("center_178", (0, 20, 178, 198)),
        ("face_128", (25, 57, 153, 185)),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_celeba_crops(celeba: Path, crop: str, box: tuple[int, int, int, int], packed: bool):
    path = zipped(celeba, "img_align_celeba.zip") if packed else str(celeba)
    source = make(64, name="celeba", path=path, crop=crop)
    assert len(source) == 3
    wanted = Image.open(celeba / "000002.jpg").crop(box).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(source[1].image, np.asarray(wanted))
    assert source[1].labels == {}
    assert all(str(edge) in source.protocol for edge in box)
    assert crop in source.protocol
    assert "non-commercial" in source.license


def test_squash_bilinear_is_what_the_published_code_does(celeba: Path):
    """DiffuseVAE and PSLD: torchvision's Resize((64, 64)) of the whole Pillow image."""
    source = make(64, name="celeba", path=str(celeba), crop="squash", resize="bilinear")
    wanted = TorchvisionResize((64, 64))(Image.open(celeba / "000001.jpg"))
    assert np.array_equal(source[0].image, np.asarray(wanted))


def test_celeba_attributes(celeba: Path, tmp_path: Path):
    values = np.array([[1, -1, 1], [-1, -1, -1], [-1, 1, 1]])
    files = [f"{i:06d}.jpg" for i in range(1, 4)]
    given = attribute_list(tmp_path / "list_attr_celeba.txt", files, values)
    source = make(8, name="celeba", path=str(celeba), attributes=given)
    assert source[0].labels == {"5_o_Clock_Shadow": 1, "Eyeglasses": 0, "Smiling": 1}
    assert [source[i].labels["Eyeglasses"] for i in range(3)] == [0, 0, 1]
    text = Path(given).read_text()
    wrong = {
        "lack": (text.replace("000003.jpg", "000004.jpg"), "has no line for 000003.jpg"),
        "cut": ("\n".join(text.splitlines()[:-1]), "announces 3 images but lists 2"),
        "value": (text.replace(" 1", " 2", 1), r"line 3 \(000001.jpg\): 3 values of 1 or -1"),
        "narrow": (text.replace("-1 -1 -1", "-1 -1"), r"line 4 \(000002.jpg\)"),
        "csv": ("image_id,Smiling\n000001.jpg,1\n000002.jpg,1", "not an attribute list"),
        "empty": ("", "not an attribute list"),
    }
    for name, (changed, says) in wrong.items():
        (tmp_path / name).write_text(changed)
        with pytest.raises(UserError, match=says):
            make(8, name="celeba", path=str(celeba), attributes=str(tmp_path / name))
    with pytest.raises(UserError, match=r"source\.attributes=nowhere.* cannot be read"):
        make(8, name="celeba", path=str(celeba), attributes="nowhere.txt")


def test_celeba_of_another_size_is_named(celeba: Path):
    picture(celeba / "000002.jpg", 0, 409, 687)
    source = make(64, name="celeba", path=str(celeba))
    with pytest.raises(DamagedImage, match=r"000002\.jpg: 409x687 pixels, CelebA's aligned images .* are 178x218"):
        source[1]
    assert source[2].key == "000003.jpg"


# CelebA-HQ


def test_celebahq_flat(tmp_path: Path):
    pixels = picture(tmp_path / "hq" / "imgHQ00000.png", 0, 256, 256)
    source = make(64, name="celebahq", path=str(tmp_path / "hq"), resize="box")
    mean = pixels.reshape(64, 4, 64, 4, 3).mean((1, 3))
    assert np.abs(source[0].image - mean).max() <= 1  # the mean of 4x4, rounded after each axis
    assert source[0].labels == {}
    assert "Box" in source.protocol
    assert np.array_equal(make(256, name="celebahq", path=str(tmp_path / "hq"))[0].image, pixels)


@pytest.mark.parametrize("packed", [False, True])
def test_celebamaskhq_reads_the_images_and_not_the_masks(tmp_path: Path, packed: bool):
    root = tmp_path / "CelebAMask-HQ"
    for i in (0, 1, 10):
        picture(root / "CelebA-HQ-img" / f"{i}.jpg", i, 64, 64)
        picture(root / "CelebAMask-HQ-mask-anno" / "0" / f"{i:05d}_hair.png", i, 32, 32)
    given = attribute_list(
        tmp_path / "CelebAMask-HQ-attribute-anno.txt", ["0.jpg", "1.jpg", "10.jpg"], np.eye(3, dtype=int) * 2 - 1
    )
    source = make(32, name="celebahq", path=zipped(root, "hq.zip") if packed else str(root), attributes=given)
    assert [source[i].key.rpartition("/")[2] for i in range(len(source))] == ["0.jpg", "1.jpg", "10.jpg"]
    assert source[2].labels == {"5_o_Clock_Shadow": 0, "Eyeglasses": 0, "Smiling": 1}
    with pytest.raises(UserError, match="holds only masks"):
        make(32, name="celebahq", path=mask_zip(root))


def mask_zip(root: Path) -> str:
    return zipped(root / "CelebAMask-HQ-mask-anno", "masks.zip")


def test_celebahq_in_male_and_female(tmp_path: Path):
    for i, name in enumerate(("train/female/0.jpg", "train/male/1.jpg", "val/female/2.jpg", "val/male/3.jpg")):
        picture(tmp_path / "celeba_hq" / name, i, 32, 32)
    source = make(32, name="celebahq", path=str(tmp_path / "celeba_hq"))
    assert [source[i].labels for i in range(4)] == [{"folder": "female"}, {"folder": "male"}] * 2


@pytest.mark.parametrize("name", ["celebahq", "ffhq"])
def test_images_that_are_not_of_the_set_are_named(tmp_path: Path, name: str):
    picture(tmp_path / "in" / "a.png", 0, 64, 64)
    picture(tmp_path / "in" / "b.png", 1, 64, 48)
    picture(tmp_path / "in" / "c.png", 2, 16, 16)
    (tmp_path / "in" / "d.png").write_bytes(b"no")
    source = make(32, name=name, path=str(tmp_path / "in"))
    for index, says in ((1, r"b\.png: 64x48 pixels"), (2, r"c\.png: 16 pixels wide, 32"), (3, r"d\.png: not an image")):
        with pytest.raises(DamagedImage, match=says):
            source[index]


# FFHQ


def test_ffhq_reads_one_of_its_variants(tmp_path: Path):
    root = tmp_path / "ffhq"
    for i in (0, 1000):
        picture(root / "thumbnails128x128" / f"{i // 1000 * 1000:05d}" / f"{i:05d}.png", i, 128, 128)
    for path in (root, root / "thumbnails128x128"):
        source = make(64, name="ffhq", path=str(path))
        assert [source[i].key[-15:] for i in range(2)] == ["00000/00000.png", "01000/01000.png"]
        assert source[0].labels == {}
    picture(root / "images1024x1024" / "00000" / "00000.png", 0, 256, 256)
    with pytest.raises(UserError, match="images1024x1024 and thumbnails128x128, the same faces twice"):
        make(64, name="ffhq", path=str(root))


# AFHQ


def afhq(root: Path, version: str) -> Path:
    suffix, test = {"v1": ("jpg", "val"), "v2": ("png", "test")}[version]
    for n, split in enumerate(("train", test)):
        for i, animal in enumerate(("cat", "dog", "wild")):
            picture(root / split / animal / f"flickr_{animal}_00000{n}.{suffix}", 3 * n + i, 32, 32)
    return root


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_afhq_in_both_versions(tmp_path: Path, version: str, packed: bool):
    root = afhq(tmp_path / "afhq", version)
    path = zipped(root, "afhq.zip") if packed else str(root)
    source = make(16, name="afhq", path=path)
    assert [source[i].labels for i in range(3)] == [{"animal": "cat"}, {"animal": "dog"}, {"animal": "wild"}]
    assert len(source) == 3
    assert all("train/" in source[i].key for i in range(3))
    assert f"AFHQ {version}, train" in source.protocol
    test = make(16, name="afhq", path=path, split="test")
    assert [test[i].key.split("/")[-3] for i in range(len(test))] == [{"v1": "val", "v2": "test"}[version]] * 3
    assert len(make(16, name="afhq", path=path, split="all")) == 6


def test_afhq_that_cannot_be(tmp_path: Path):
    afhq(tmp_path / "both", "v1")
    afhq(tmp_path / "both", "v2")
    lacking = afhq(tmp_path / "lacking", "v2")
    (lacking / "train" / "wild" / "flickr_wild_000000.png").unlink()
    flat = tmp_path / "flat"
    picture(flat / "cat" / "0.png", 0, 32, 32)
    for path, says in (
        ("both", r"val \(version 1\) and test \(version 2\)"),
        ("lacking", "has no wild in train"),
        ("flat", "has none of train/cat"),
        ("nowhere", "does not exist"),
    ):
        with pytest.raises(UserError, match=says) as error:
            make(16, name="afhq", path=str(tmp_path / path))
        assert "\n" not in str(error.value)


# Parquet


def hub_table(count: int, start: int = 0) -> pyarrow.Table:
    """Rows as hubs publish them: image {bytes, path}, and the names of the classes in the metadata."""
    images = [{"bytes": encode_png(noise(start + i, 12, 12)), "path": f"{start + i}.png"} for i in range(count)]
    table = pyarrow.table(
        {
            "image": pyarrow.array(images, pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])),
            "label": pyarrow.array([(start + i) % 3 for i in range(count)], pyarrow.int64()),
            "smiling": pyarrow.array([i % 2 == 0 for i in range(count)]),
            "caption": pyarrow.array([f"number {start + i}" for i in range(count)]),
            "box": pyarrow.array([[1.0, 2.0]] * count),
        }
    )
    features = {"label": {"names": ["cat", "dog", "wild"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    for n, (split, count) in enumerate((("train", 7), ("train", 5), ("test", 3))):
        path = tmp_path / "data" / f"{split}-{n:05d}-of-00003.parquet"
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(hub_table(count, 7 * n), path, row_group_size=3)
    return tmp_path / "data"


def test_parquet_as_hubs_publish_it(hub: Path):
    source = make(12, name="parquet", path=str(hub / "train-*.parquet"), labels=["label", "smiling", "caption"])
    assert len(source) == 12
    for index in (0, 6, 7, 11, 2):  # back and forth over files and row groups
        item = source[index]
        assert np.array_equal(item.image, noise(index, 12, 12))
        assert item.labels["label"] == ("cat", "dog", "wild")[index % 3]
        assert item.labels["caption"] == f"number {index}"
        assert item.labels["smiling"] in (0, 1)
    assert len({source[i].key for i in range(12)}) == 12
    assert len(make(12, name="parquet", path=str(hub))) == 15
    assert len(make(12, name="parquet", path=str(hub / "test-00002-of-00003.parquet"))) == 3
    assert make(12, name="parquet", path=str(hub))[0].labels == {}


def test_parquet_with_plain_bytes(tmp_path: Path):
    table = pyarrow.table({"img": [encode_png(noise(4, 12, 12)), b"no picture", None], "y": [5, 6, None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = make(12, name="parquet", path=str(tmp_path / "a.parquet"), image="img", labels=["y"])
    assert np.array_equal(source[0].image, noise(4, 12, 12))
    assert source[0].labels == {"y": 5}
    for index, says in ((1, r"a\.parquet:0:1: not an image file"), (2, r"a\.parquet:0:2: column 'img' holds no bytes")):
        with pytest.raises(DamagedImage, match=says):
            source[index]


def test_a_damaged_row_group_is_named(hub: Path):
    path = hub / "test-00002-of-00003.parquet"
    source = make(12, name="parquet", path=str(path))
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)
    with pytest.raises(DamagedImage, match=r"test-00002-of-00003\.parquet:0:1: row group 0"):
        source[1]


def test_parquet_that_cannot_be(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "text.parquet").write_text("hello, I am no parquet file")
    (tmp_path / "empty").mkdir()
    cut = tmp_path / "cut.parquet"
    cut.write_bytes((hub / "test-00002-of-00003.parquet").read_bytes()[:-30])
    for node, says in (
        ({"path": str(tmp_path / "nowhere")}, "names no Parquet file"),
        ({"path": str(tmp_path / "empty")}, "names no Parquet file"),
        ({"path": str(tmp_path / "text.parquet")}, "text.parquet is not a readable Parquet file"),
        ({"path": str(cut)}, "cut.parquet is not a readable Parquet file"),
        ({"path": str(hub), "image": "img"}, "no column 'img'"),
        ({"path": str(hub), "image": "imag"}, "did you mean 'image'"),
        ({"path": str(hub), "labels": ["lable"]}, "did you mean 'label'"),
        ({"path": str(hub), "image": "caption"}, "has string there, not the bytes"),
        ({"path": str(hub), "labels": ["box"]}, "column 'box' of .* holds list"),
    ):
        with pytest.raises(UserError, match=says) as error:
            make(12, name="parquet", **node)
        assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"pip install 'dvae\[parquet\]'"):
        make(12, name="parquet", path=str(hub))


# All of them


@pytest.mark.parametrize(
    ("preset", "name", "fields"),
    [
        ("published_cifar10", "cifar10", {"split": "train"}),
        ("published_celeba", "celeba", {"crop": "squash", "resize": "bilinear"}),
        ("celeba_song", "celeba", {"crop": "center_140", "resize": "bilinear"}),
        ("published_celebahq", "celebahq", {"resize": "bilinear"}),
        ("published_ffhq", "ffhq", {"resize": "bilinear"}),
        ("published_afhq", "afhq", {"split": "train", "resize": "bilinear"}),
    ],
)
def test_presets_compose(preset: str, name: str, fields: dict[str, str]):
    node = SOURCES.config(compose("shards", [f"source={preset}", "source.path=x", "out=y"]).source)
    assert (node.name, node.path) == (name, "x")
    assert {field: getattr(node, field).value for field in fields} == fields


def every_source(tmp_path: Path) -> dict[str, dict]:
    """A node for each source of a published data set, on files in its layout."""
    picture(tmp_path / "celeba" / "000001.jpg", 0, 178, 218)
    picture(tmp_path / "celeba" / "000002.jpg", 1, 178, 218)
    given = attribute_list(tmp_path / "list.txt", ["000001.jpg", "000002.jpg"], np.ones((2, 3), int))
    for name in ("celebahq", "ffhq"):
        for i in range(3):
            picture(tmp_path / name / f"{i}.png", i, 16, 16)
    (tmp_path / "parquet").mkdir()
    pyarrow.parquet.write_table(hub_table(4), tmp_path / "parquet" / "a.parquet")
    return {
        "celeba": {"path": str(tmp_path / "celeba"), "attributes": given},
        "celebahq": {"path": zipped(tmp_path / "celebahq", "hq.zip")},
        "ffhq": {"path": str(tmp_path / "ffhq")},
        "afhq": {"path": str(afhq(tmp_path / "afhq", "v2"))},
        "cifar10": {"path": archive(tmp_path / "c.tar.gz", cifar_files("binary"))},
        "parquet": {"path": str(tmp_path / "parquet"), "labels": ["label"]},
    }


def test_every_data_set_goes_into_shards_and_back(tmp_path: Path):
    for name, node in every_source(tmp_path).items():
        source = make(8, name=name, **node)
        copy = pickle.loads(pickle.dumps(source))
        out = tmp_path / "shards" / name
        manifest = build({"name": name, **node}, 8, out, 0.0, shard_size=2, workers=1)
        assert (manifest.license, manifest.protocol) == (source.license, source.protocol)
        assert manifest.source["name"] == name
        with_shards = Shards(out)
        assert len(with_shards) == len(source)
        for index in range(len(source)):
            item = copy[index]
            assert np.array_equal(with_shards.read([index])[0].permute(1, 2, 0).numpy(), item.image)
            assert with_shards.info(index) == {"key": item.key, "labels": item.labels}


def test_both_archives_of_cifar10_give_the_same_shards(tmp_path: Path):
    splits = []
    for kind in ("python", "binary"):
        path = archive(tmp_path / f"{kind}.tar.gz", cifar_files(kind))
        splits.append(build({"name": "cifar10", "path": path}, 32, tmp_path / kind, 0.2, workers=1).splits)
    assert splits[0] == splits[1]  # hashes and all


@pytest.mark.slow
def test_rendered_faces_in_celebahqs_layout_go_through_shards(tmp_path: Path):
    """300 avatars of 256x256 as JPEG files of CelebAMask-HQ, by two processes, and every image back."""
    faces = make(256, name="avatars", n=300)
    folder = tmp_path / "CelebAMask-HQ" / "CelebA-HQ-img"
    folder.mkdir(parents=True)
    for i in range(300):
        Image.fromarray(faces[i].image).save(folder / f"{i}.jpg", quality=95)
    node = {"name": "celebahq", "path": str(tmp_path / "CelebAMask-HQ")}
    manifest = build(node, 256, tmp_path / "shards", 0.1, shard_size=128, workers=2)
    assert manifest.count("train") + manifest.count("heldout") == 300
    assert verify(tmp_path / "shards") == manifest
    for split in ("train", "heldout"):
        shards = Shards(tmp_path / "shards", split)
        for index in range(len(shards)):
            key = shards.info(index)["key"]
            wanted = np.asarray(Image.open(tmp_path / "CelebAMask-HQ" / key))
            assert torch.equal(shards.read([index])[0].permute(1, 2, 0), torch.from_numpy(wanted.copy()))
