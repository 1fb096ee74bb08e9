"""Files of data sets that a stranger may have written: bounded, named, and nothing in them is executed."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from memory_support import little_memory
from PIL import Image
from test_sources_datasets import archive, batch_pickle, batches, cifar_files, make, noise, short, unpacked

from dvae.data.images import DamagedImage, encode_png
from dvae.errors import UserError
from dvae.registry.sources import parquet
from dvae.registry.sources.idx import LIMIT

pytestmark = pytest.mark.timeout(60)
SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "a pipe": (os.mkfifo, "is a pipe, not a file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a file"),
    "a loop": (lambda path: path.symlink_to(path.name), "Too many levels"),
}


def idx(path: Path, shape: tuple[int, ...], data: bytes) -> str:
    whole = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + data
    path.write_bytes(gzip.compress(whole) if path.suffix == ".gz" else whole)
    return str(path)


@pytest.mark.parametrize(("name", "shape", "data", "says"), [
    ("a.gz", (2, 4, 4), bytes(10**9), "holds more bytes of images or labels, its header says 32"),
    ("a", (2**31, 2**31, 2**31), b"", "has the sizes .* the file is damaged"),
    ("a.gz", (1, 2**15, 2**15 + 1), bytes(99), f"at most {LIMIT} bytes: the file is damaged"),
    ("a.gz", (1000, 1000, 1000), bytes(99), "holds 99 bytes of images or labels, its header says 1000000000"),
    ("a", (2, 4, 4), bytes(31), "holds 31 bytes .* says 32"),
    ("a", (), b"", "the file is damaged"),
])  # fmt: skip
def test_idx_files_that_lie_about_their_size(tmp_path: Path, name: str, shape: tuple[int, ...], data: bytes, says: str):
    path = idx(tmp_path / name, shape, data)
    del data
    with little_memory(), pytest.raises(UserError, match=says):
        make(4, 1, name="idx", images=path)


@pytest.mark.parametrize("name", SPECIAL)
def test_special_files_are_named(tmp_path: Path, name: str):
    write, says = SPECIAL[name]
    write(tmp_path / "x")
    write(tmp_path / "a.parquet")
    good = idx(tmp_path / "good", (1, 4, 4), bytes(16))
    folder = Path(unpacked(tmp_path / "cifar", cifar_files("python"))) / "cifar-10-batches-py"
    (folder / "data_batch_2").unlink()
    write(folder / "data_batch_2")
    Image.new("RGB", (178, 218)).save(tmp_path / "000001.jpg")
    nodes: list[dict[str, str]] = [
        {"name": "idx", "images": str(tmp_path / "x")},
        {"name": "idx", "images": good, "labels": str(tmp_path / "x")},
        {"name": "zip", "path": str(tmp_path / "x")},
        {"name": "cifar10", "path": str(tmp_path / "x")},
        {"name": "cifar10", "path": str(folder)},
        {"name": "parquet", "path": str(tmp_path / "a.parquet")},
        {"name": "celeba", "path": str(tmp_path), "attributes": str(tmp_path / "x")},
        {"name": "ffhq", "path": str(tmp_path / "x")},
    ]
    for node in nodes:
        with pytest.raises(UserError, match=f"{says}|names no Parquet file") as error:
            make(4, 3, **node)
        assert "\n" not in str(error.value)


def pickled(labels: bytes) -> bytes:
    """A batch whose labels are made by these instructions."""
    whole = batch_pickle(*batches()["data_batch_1"])
    begin = whole.index(short(b"labels")) + len(short(b"labels"))
    return whole[:begin] + labels + whole[whole.index(short(b"data")) :]


BATCHES: dict[str, bytes] = {
    "a place 2**31 to remember": pickled(b"]r" + struct.pack("<I", 2**31 - 1)),
    "a place 10**12 to remember": pickled(b"]p1000000000000\n"),
    "8 GB of zeros": pickled(b"\x96" + struct.pack("<Q", 2**33)),
    "a text of 4 GB": pickled(b"T" + struct.pack("<i", 2**31 - 1)),
    "lists of lists, 10**10 numbers": pickled(
        b"](" + b"K\x01" * 10 + b"e" + b"".join(b"q%c](" % n + b"h%c" % n * 10 + b"e" for n in range(9))
    ),
    "a list in itself": pickled(b"]q\x00h\x00a"),
    "labels of fractions": pickled(b"](" + b"G" + struct.pack(">d", 1.5) + b"e"),
    "a label of 10**400": pickled(pickle.dumps([10**400], 2)[2:-1]),
    "no labels": pickled(b"N"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches_that_ask_for_memory(tmp_path: Path, name: str):
    files = cifar_files("python") | {"cifar-10-batches-py/data_batch_1": BATCHES[name]}
    path = unpacked(tmp_path / "data", files)
    with little_memory(), pytest.raises(UserError, match="data_batch_1 is not a batch of CIFAR-10") as error:
        make(32, name="cifar10", path=path)
    assert "\n" not in str(error.value)


def test_a_batch_of_1_gb_is_not_unpacked(tmp_path: Path):
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz", compresslevel=1) as tar:
        info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        info.size = 10**9
        tar.addfile(info, _Zeros())
    with little_memory(), pytest.raises(UserError, match="data_batch_1: has 1000000000 bytes, more than a batch has"):
        make(32, name="cifar10", path=str(tmp_path / "x.tar.gz"))


class _Zeros:
    def read(self, size: int) -> bytes:
        return bytes(size)


def test_an_archive_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("dvae.data.archives.UNPACKED", 10**8)
    files = cifar_files("python")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz", compresslevel=1) as tar:
        info = tarfile.TarInfo("zeros")
        info.size = 2 * 10**8
        tar.addfile(info, _Zeros())
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(UserError, match=r"cannot be read as a tar archive .*a part at byte"):
        make(32, name="cifar10", path=str(tmp_path / "x.tar.gz"))


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress, gzip.compress, bytes])
def test_archives_of_every_compression_are_read(tmp_path: Path, pack: Callable[[bytes], bytes]):
    plain = gzip.decompress(Path(archive(tmp_path / "x.tar.gz", cifar_files("binary"))).read_bytes())
    (tmp_path / "y.tar").write_bytes(pack(plain))
    assert len(make(32, name="cifar10", path=str(tmp_path / "y.tar"))) == 20


@pytest.mark.parametrize("first", ["²", "9" * 5000, "-1", "1.5"])
def test_a_list_of_attributes_with_a_strange_number(tmp_path: Path, first: str):
    Image.new("RGB", (178, 218)).save(tmp_path / "000001.jpg")
    (tmp_path / "list.txt").write_text(f"{first}\nSmiling\n000001.jpg 1\n", encoding="utf-8")
    with pytest.raises(UserError, match="is not an attribute list"):
        make(4, 3, name="celeba", path=str(tmp_path), attributes=str(tmp_path / "list.txt"))


def test_a_picture_that_stands_in_every_row_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Parquet keeps equal values once: a row group that takes 300 MB has 100 KB in the file."""
    monkeypatch.setattr(parquet, "GROUP_LIMIT", 20 * 2**20)
    path, picture = tmp_path / "a.parquet", encode_png(noise(0, 180, 180))
    pyarrow.parquet.write_table(pyarrow.table({"image": [picture] * 3000}), path)
    assert path.stat().st_size < 2 * len(picture)
    source = make(12, name="parquet", path=str(path))
    with little_memory(100 * 2**20), pytest.raises(DamagedImage, match="it takes more than 20971520 bytes"):
        source[0]


def test_more_rows_than_bytes(tmp_path: Path):
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"x"] * 10**6}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet states 1000000 rows in \d+ bytes: the file is damaged"):
        make(12, name="parquet", path=str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("metadata", [
    b"", b"{", b"[]", b"7", b'{"info": {"features": {"y": {"_type": "ClassLabel", "names": 7}}}}',
    b'{"info": {"features": {"y": {"_type": "ClassLabel", "names": [7]}}}}', b"[" * 10**5,
    b'{"info": {"features": {"y": {"_type": "ClassLabel"}}}}', b'{"info": 7}',
])  # fmt: skip
def test_names_of_classes_that_make_no_sense_are_passed_over(tmp_path: Path, metadata: bytes):
    table = pyarrow.table({"image": [encode_png(noise(4, 12, 12))], "y": [0]})
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "a.parquet")
    assert make(12, name="parquet", path=str(tmp_path / "a.parquet"), labels=["y"])[0].labels == {"y": 0}


def test_keys_of_classes_still_become_names(tmp_path: Path):
    features = {"y": {"names": ["cat"], "_type": "ClassLabel"}}
    table = pyarrow.table({"image": [encode_png(noise(4, 12, 12))], "y": [0]})
    about = {"huggingface": json.dumps({"info": {"features": features}})}
    pyarrow.parquet.write_table(table.replace_schema_metadata(about), tmp_path / "a.parquet")
    assert make(12, name="parquet", path=str(tmp_path / "a.parquet"), labels=["y"])[0].labels == {"y": "cat"}
