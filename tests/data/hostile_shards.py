"""Shards, images and archives that a stranger could send: damaged, hostile, or no files at all.

`HOSTILE` lists the cases. Each writes into an empty folder and returns what is to be read there; `READERS` has a way to
read every kind. A case whose `sound` is true is read, and the pixels are those that were written. Any other ends in one
UserError or MachineError. None may block, take much memory, or start anything.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hostile_archives import ARRAYS, TARS, ZIPS, array, other_count, sound_tar, sound_zip
from hostile_files import ABOUT, MARK, PIXELS, PNGS, SOUND_PNGS, SPECIAL, TEXTS, Executes, npy
from hostile_images import IMAGES, picture_in_folder, pictures, sparse_picture, special_picture

from dvae.data.images import encode_png
from dvae.data.shards.manifest import Manifest
from dvae.data.shards.tar_files import ShardWriter, seal


@dataclass(frozen=True)
class Hostile:
    """One case."""

    kind: str
    """A key of READERS."""
    name: str
    write: Callable[[Path], Path]
    """Fill an empty folder; returns what to read."""
    sound: bool = False
    """Whether it is to be read."""


HOSTILE: list[Hostile] = []


def add(kind: str, name: str, write: Callable[[Path], Path], sound: bool = False) -> None:
    HOSTILE.append(Hostile(kind, name, write, sound))


# --- shards


def shards(folder: Path, first: bytes = b"", about: bytes = b"") -> Path:
    """Sound shards of the three images, two to train on; or with another file as the first image or beside it."""
    made: dict[str, list[Any]] = {}
    for split, numbers in (("train", (0, 1)), ("heldout", (2,))):
        writer = ShardWriter(folder / f"{split}-000000.tar")
        for number in numbers:
            picture = first if first and not number else encode_png(PIXELS[number])
            text = about if about and not number else ABOUT
            writer.write(number, {"png": picture, "json": text})
        writer.close()
        made[split] = [seal(writer.path)]
    manifest = Manifest(
        image_size=8, channels=3, source={"name": "folder"}, license="CC0", protocol="", heldout_fraction=0.3,
        shard_size=10, splits=made, labels={"kind": ["cat"]},
    )  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest.as_dict()))
    return folder


def change(folder: Path, **fields: Any) -> Path:
    """Change fields of the manifest; those of the first training shard begin with "its_"."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, value in fields.items():
        if name.startswith("its_"):
            manifest["splits"]["train"][0][name.removeprefix("its_")] = value
        elif value is None:
            del manifest[name]
        else:
            manifest[name] = value
    path.write_text(json.dumps(manifest))
    return folder


def text(folder: Path, change: Callable[[bytes], bytes]) -> Path:
    """Change the manifest's bytes."""
    path = shards(folder) / "manifest.json"
    path.write_bytes(change(path.read_bytes()))
    return folder


def special(folder: Path, name: str, make: Callable[[Path], None]) -> Path:
    """Put something else in the place of a file of the shards."""
    (shards(folder) / name).unlink()
    make(folder / name)
    return folder


def index(folder: Path, data: bytes | np.ndarray, **fields: Any) -> Path:
    """Another index of the training shard, with its right hash in the manifest."""
    shards(folder)
    if not isinstance(data, bytes):
        file = io.BytesIO()
        np.save(file, data, allow_pickle=True)
        data = file.getvalue()
    (folder / "train-000000.npy").write_bytes(data)
    return change(folder, its_index_sha256=hashlib.sha256(data).hexdigest(), **fields)


MANIFEST_TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda data: b"",
    "cut": lambda data: data[:-20],
    "a list": lambda data: b"[]",
    "null": lambda data: b"null",
    "bytes that are no UTF-8": lambda data: data.replace(b"CC0", b"\xff\xfe"),
    "zeros": lambda data: bytes(1000),
    "a key twice": lambda data: data.replace(b'"version": 1,', b'"version": 1, "version": 1,'),
    "a fraction that is NaN": lambda data: data.replace(b'"heldout_fraction": 0.3', b'"heldout_fraction": NaN'),
    "a fraction without end": lambda data: data.replace(b'"heldout_fraction": 0.3', b'"heldout_fraction": 1e999'),
    "a size of 5000 digits": lambda data: data.replace(b'"image_size": 8', b'"image_size": ' + b"9" * 5000),
    "a million brackets": lambda data: b'{"version": 1, "source": ' + b"[" * 10**6,
    "a version that is true": lambda data: data.replace(b'"version": 1', b'"version": true'),
    "another version": lambda data: data.replace(b'"version": 1', b'"version": 2'),
    "33 MiB": lambda data: data + b" " * 33 * 2**20,
    "17 million lists": lambda data: data.replace(b'{"name": "folder"}', b'{"x": [' + b"[]," * (5 * 2**20) + b"0]}"),
}
FIELDS: dict[str, list[Any]] = {
    "image_size": [None, 0, -8, 4097, 2**31, 2**70, 8.5, "8", True, [8]],
    "channels": [None, 0, 2, -1, 2**40, "3"],
    "source": [None, "folder", 7],
    "heldout_fraction": [None, -0.5, 1.5, "0.1"],
    "shard_size": [0, -1, 1.5],
    "splits": [None, {}, [], {"train": []}, {"train": [], "heldout": [], "more": []}, {"train": {}, "heldout": []},
               {"train": [7], "heldout": []}, {"train": [{}], "heldout": []}, "x"],
    "labels": [None, [], {"kind": "cat"}, {"kind": [1.5]}, {"kind": [["cat"]]}, {"kind": None}, 7],
    "damaged": [-1, 1.5, "1"],
    "damaged_first": [[7], "x", {}],
    "more": [1],
    "its_file": ["../../x.tar", "/dev/zero", "a|b.tar", "", ".tar", "..", ".hidden.tar", "-rf.tar", "a b.tar",
                 "a\n.tar",
                 "a;touch executed;.tar", "$(touch executed).tar", "ä.tar", "%s.tar", "x" * 300 + ".tar", "x.bin",
                 "train-000000.npy", "sub/x.tar", "a\x00.tar", "manifest.json", 7],
    "its_index": ["../x.npy", "/dev/zero", "", "x.tar", "heldout-000000.npy", None],
    "its_count": [0, -1, 1, 3, 1.5, "2", True, 2**31, 2**62, 2**63, 10**30],
    "its_bytes": [0, -1, 100, 2**63, 10**30, "1"],
    "its_sha256": ["", "0" * 63, "0" * 65, "g" * 64, "A" * 64, 7],
    "its_index_sha256": ["", "0" * 64, "../" * 20],
    "its_more": [1],
}  # fmt: skip
"""Values of the manifest that no build writes."""
ROWS = np.array([[512, 200, 1536, 40], [2560, 200, 3584, 40]], np.int64)


def _with(row: int, column: int, value: int) -> np.ndarray:
    changed = ROWS.copy()
    changed[row, column] = value
    return changed


INDICES: dict[str, bytes | np.ndarray] = {
    "text": b"nonsense",
    "objects": np.array([[Executes()] * 4] * 2, dtype=object),
    "fractions": ROWS.astype(np.float64),
    "short numbers": ROWS.astype(np.int32),
    "big-endian numbers": ROWS.astype(">i8"),
    "records": np.zeros(2, dtype="i8,i8,i8,i8"),
    "one axis": ROWS.ravel(),
    "three numbers": ROWS[:, :3],
    "three rows": np.concatenate([ROWS, ROWS[:1]]),
    "no row": ROWS[:0],
    "a scalar": np.int64(7),
    "a negative place": _with(0, 0, -512),
    "a negative size": _with(0, 1, -200),
    "a place beyond": _with(1, 0, 2**40),
    "a size beyond": _with(1, 1, 2**40),
    "numbers that overflow together": _with(0, 0, 2**63 - 1),
    "sizes that overflow": _with(0, 1, 2**63 - 1),
    "a negative shape": npy("{'descr': '<i8', 'fortran_order': False, 'shape': (-2, -4), }", ROWS.tobytes()),
    "a shape of 2**62": npy(f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({2**62}, 4), }}", ROWS.tobytes()),
    "a shape that overflows": npy(f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({2**61}, 8), }}"),
    "a shape of truth": npy("{'descr': '<i8', 'fortran_order': False, 'shape': (True, 8), }", ROWS.tobytes()),
    "a call in the header": npy(f"__import__('os').system('touch {MARK}')"),
    "brackets in the header": npy("(" * 110),
    "half the numbers": npy("{'descr': '<i8', 'fortran_order': False, 'shape': (2, 4), }", ROWS.tobytes()[:32]),
    "another version": b"\x93NUMPY\x09\x00" + bytes(100),
    "a file in 1 MB": ROWS.tobytes() * 20_000,
}


def _other_tar(folder: Path, size: int, hole: bool = False) -> Path:
    """A training shard of another size than the manifest says, which takes no room on the disk."""
    os.truncate(shards(folder) / "train-000000.tar", size)
    return folder


def _sparse_member(folder: Path) -> Path:
    """The manifest, the shard and the index agree on an image of 1 TB."""
    rows = np.load(shards(folder) / "train-000000.npy")
    rows[0, 1] = 2**40
    index(folder, rows, its_bytes=2**41)
    os.truncate(folder / "train-000000.tar", 2**41)
    return folder


def _many_rows(folder: Path) -> Path:
    """The manifest claims a million images in a hole, the index has two."""
    change(shards(folder), its_bytes=2**41, its_count=10**6)
    os.truncate(folder / "train-000000.tar", 2**41)
    return folder


def _two_shards(folder: Path) -> Path:
    """The same shard twice: each image would count twice."""
    path = shards(folder) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"] *= 2
    path.write_text(json.dumps(manifest))
    return folder


def _many_images(folder: Path) -> Path:
    """A thousand shards with a billion images each."""
    path = shards(folder) / "manifest.json"
    manifest = json.loads(path.read_text())
    (row,) = manifest["splits"]["train"]
    manifest["splits"]["train"] = [
        {**row, "file": f"{k}.tar", "index": f"{k}.npy", "count": 10**9, "bytes": 2**43} for k in range(1000)
    ]
    path.write_text(json.dumps(manifest))
    return folder


def _by_columns(folder: Path) -> Path:
    """An index whose numbers lie column by column."""
    return index(folder, np.asfortranarray(np.load(shards(folder) / "train-000000.npy")))


add("shards", "sound", shards, sound=True)
for name, data in SOUND_PNGS.items():
    add("shards", f"an image with {name}", lambda folder, data=data: shards(folder, data), sound=True)
add("shards", "an index by columns", _by_columns, sound=True)
for name, edit in MANIFEST_TEXTS.items():
    add("shards", f"manifest: {name}", lambda folder, edit=edit: text(folder, edit))
for field, values in FIELDS.items():
    for value in values:
        add(
            "shards",
            f"{field.replace('its_', 'shard: ')} = {str(value)[:30]!r} of {len(str(value))}",
            lambda folder, field=field, value=value: change(shards(folder), **{field: value}),
        )
for file in ("manifest.json", "train-000000.tar", "train-000000.npy"):
    for name, make in SPECIAL.items():
        add("shards", f"{file} is {name}", lambda folder, file=file, make=make: special(folder, file, make))
for name, found in INDICES.items():
    add("shards", f"index: {name}", lambda folder, found=found: index(folder, found))
for name, data in PNGS.items():
    add("shards", f"image: {name}", lambda folder, data=data: shards(folder, data or b" "))
for name, data in TEXTS.items():
    add("shards", f"text beside an image: {name}", lambda folder, data=data: shards(folder, b"", data or b" "))
add("shards", "a longer shard", lambda folder: _other_tar(folder, 2**41))
add("shards", "a shorter shard", lambda folder: _other_tar(folder, 700))
add("shards", "an image of 1 TB", _sparse_member)
add("shards", "a million images in a hole", _many_rows)
add("shards", "a shard twice", _two_shards)
add("shards", "10**12 images", _many_images)
add("shards", "no such folder", lambda folder: folder / "nowhere")
add("shards", "a file", lambda folder: special(folder, "manifest.json", Path.touch) / "manifest.json")
for kind in ("tree", "images"):
    add(kind, "sound folder", pictures, sound=True)
    add(kind, "sound zip", sound_zip, sound=True)
    for name, data in IMAGES.items():
        add(kind, f"image: {name}", lambda folder, data=data: picture_in_folder(folder, data()))
    for name, make in SPECIAL.items():
        add(kind, f"a.png is {name}", lambda folder, make=make: special_picture(folder, make))
        for file in ("x.zip", "x.tar", "x.npy") if kind == "images" else ("x.zip",):
            add(kind, f"{file} is {name}", lambda f, make=make, file=file: (make(f / file), f / file)[1])
    add(kind, "an image file of 1 TB", sparse_picture)
    add(kind, "an empty folder", lambda folder: folder)
    add(kind, "no such folder", lambda folder: folder / "nowhere")
    add(kind, "zip: another number of members", other_count, sound=True)
    for name, write in ZIPS.items():
        add(kind, f"zip: {name}", write)
add("images", "sound tar", sound_tar, sound=True)
add("images", "sound array", lambda folder: array(folder, PIXELS), sound=True)
add("images", "an array by columns", lambda folder: array(folder, np.asfortranarray(PIXELS)), sound=True)
for name, write in TARS.items():
    add("images", f"tar: {name}", write)
for name, write in ARRAYS.items():
    add("images", f"array: {name}", write)
for name, data in IMAGES.items():
    add("mask", f"mask: {name}", lambda folder, data=data: picture_in_folder(folder, data()) / "a.png")
for name, make in SPECIAL.items():
    add("mask", f"mask is {name}", lambda folder, make=make: special_picture(folder, make) / "a.png")
add("mask", "mask: an array", lambda folder: array(folder, PIXELS))


# --- how they are read


def read_shards(place: Path) -> np.ndarray:
    from dvae.data.shards.reader import Shards

    found = []
    for split in ("train", "heldout"):
        data = Shards(place, split)
        found.append(data.read(range(len(data))).permute(0, 2, 3, 1).numpy())
        data.classes("kind", ["cat"])
        assert [data.info(number)["key"] for number in range(len(data))]
    return np.concatenate(found)


def read_tree(place: Path) -> np.ndarray:
    from dvae.data.image_tree import open_tree
    from dvae.data.images import Crop, DamagedImage, decode, fit
    from dvae.errors import MachineError

    tree = open_tree(str(place))
    try:
        return np.stack([fit(decode(tree.read(name), name), 8, 3, Crop.none, name) for name in tree.names])
    except DamagedImage as error:  # a build counts it, and goes on
        raise MachineError(f"damaged image {error}") from None


def read_images(place: Path) -> np.ndarray:
    from dvae.evaluation.image_sets import open_image_set

    images = open_image_set("images", str(place))
    return images.read(0, len(images)).permute(0, 2, 3, 1).numpy()


def read_mask(place: Path) -> np.ndarray:
    from dvae.inference.generation.edit_tasks import read_mask as read

    return read(str(place), 8).numpy()


READERS: dict[str, Callable[[Path], np.ndarray]] = {
    "shards": read_shards,
    "tree": read_tree,
    "images": read_images,
    "mask": read_mask,
}
"""Read what a case has written, as (n, H, W, C) uint8. Raises UserError or MachineError."""
