"""CIFAR-10: 60,000 photographs of ten classes, of 32x32 pixels."""

from __future__ import annotations

import io as bytes_io
import math
import pickle
import pickletools
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from omegaconf import MISSING
from PIL import Image

from dvae.data.archives import files_of, open_tar
from dvae.data.images import Crop, Resize, filtered, fit
from dvae.data.published_datasets import PublishedSplit
from dvae.errors import UserError, fold
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.sources.base import SOURCES, Item, Source
from dvae.utils.read import DamagedFile, read_bytes

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCHES = {
    PublishedSplit.train: [f"data_batch_{number}" for number in range(1, 6)],
    PublishedSplit.test: ["test_batch"],
    PublishedSplit.all: [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"],
}
SIZE = 32
RECORD = 3 * SIZE * SIZE
"""Bytes of one image: all red values, then all green values, then all blue values."""
LIMIT = 64 * 2**20
"""Largest accepted batch in bytes. The published batches have 31 million bytes."""
ARRAY = "numpy.core.multiarray._reconstruct"
NAMES = {ARRAY, "numpy.ndarray", "numpy.dtype"}
"""All classes and functions that the pickles of the published batches name."""


@SOURCES.register("cifar10")
class Cifar10(Source):
    """CIFAR-10 (Krizhevsky 2009). The label "class" is the name of the class.

    The source is cifar-10-python.tar.gz, cifar-10-binary.tar.gz, or a folder with the unpacked files. Both archives
    hold the same images in the same order, and give the same shards.
    """

    license = (
        "CIFAR-10: no license stated, gathered from the web for research; Krizhevsky 2009, Learning Multiple Layers "
        "of Features from Tiny Images"
    )

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        path: str = MISSING
        """The python or binary archive (.tar.gz), or a folder with the unpacked files."""
        split: PublishedSplit = PublishedSplit.train
        """Part of the data set: train (50,000 images), test (10,000 images), or all."""
        resize: Resize = Resize.lanczos
        """Filter for scaling, if image_size is not 32."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        self.config, self.shapes = config, shapes
        self.protocol = f"CIFAR-10 {config.split.value} images, 32x32 as published"
        if shapes.image_size != SIZE:
            self.protocol += f", scaled; {filtered(config.resize)}"
        names = BATCHES[config.split]
        batches = {name: read_batch(path, data) for name, (path, data) in _find(config.path, names).items()}
        counts = {len(labels) for labels, _ in batches.values()}
        if len(counts) > 1:
            raise UserError(f"source.path={config.path}: batches of {sorted(counts)} images: one of them is cut short")
        self.images = np.concatenate([batches[name][1] for name in names])
        self.labels = np.concatenate([batches[name][0] for name in names])
        self.keys = [f"{name}/{row:05d}" for name in names for row in range(len(batches[name][0]))]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        image = Image.fromarray(np.ascontiguousarray(self.images[index].reshape(3, SIZE, SIZE).transpose(1, 2, 0)))
        key = self.keys[index]
        pixels = fit(image, self.shapes.image_size, self.shapes.channels, Crop.none, key, self.config.resize)
        return Item(key, pixels, {"class": CLASSES[self.labels[index]]})


def _find(path: str, names: list[str]) -> dict[str, tuple[str, bytes]]:
    """Return name of the batch -> (its place, its bytes).

    All batches have the same format, either python or binary. Raises UserError if the archive or folder is missing or
    damaged, or lacks a batch.
    """
    wanted = {f"{name}{suffix}" for name in names for suffix in ("", ".bin")}
    found = _members(path, wanted)
    for suffix in ("", ".bin"):
        if any(f"{name}{suffix}" in found for name in names):
            lacking = [name for name in names if f"{name}{suffix}" not in found]
            if lacking:
                raise UserError(f"source.path={path} lacks {lacking[0]}{suffix}: name a complete archive or folder")
            return {name: (f"{path}:{name}{suffix}", found[f"{name}{suffix}"]) for name in names}
    raise UserError(
        f"source.path={path} holds no batches of CIFAR-10 ({names[0]} or {names[0]}.bin): name "
        "cifar-10-python.tar.gz, cifar-10-binary.tar.gz or the folder it was unpacked to"
    )


def _members(path: str, wanted: set[str]) -> dict[str, bytes]:
    """Read the files named `wanted` from an archive or below a folder. Nothing is unpacked to the disk."""
    root = Path(path).expanduser()
    try:
        if root.is_dir():
            return {file.name: read_bytes(file, LIMIT) for file in sorted(root.rglob("*")) if file.name in wanted}
        with open_tar(root, LIMIT, compressed=True) as archive:
            files = {PurePosixPath(name).name: member for name, member in files_of(archive).items()}
            chosen = {name: files[name] for name in wanted & set(files)}
            for name, member in chosen.items():
                if member.size > LIMIT:
                    raise DamagedFile(f"{path}:{name}", f"has {member.size} bytes, more than a batch has")
            return {name: archive.extractfile(member).read() for name, member in chosen.items()}  # type: ignore[union-attr]
    except FileNotFoundError:
        raise UserError(
            f"source.path={path} does not exist: name cifar-10-python.tar.gz or the folder it was unpacked to"
        ) from None
    except DamagedFile as error:
        raise UserError(f"source.path={path} cannot be read as a tar archive or a folder of batches: {error}") from None
    except OSError as error:
        raise UserError(f"source.path={path} cannot be read as a tar archive: {fold(error)}") from None


def read_batch(path: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Read one batch in either format.

    Returns labels (N,) and images (N, 3072), both uint8. Raises UserError with `path` in the message if `data` is not a
    valid batch.
    """
    labels, images = _binary(path, data) if path.endswith(".bin") else _pickled(path, data)
    if len(labels) == 0 or labels.max() >= len(CLASSES):
        raise UserError(f"{path}: labels must be 0 to 9: the file is damaged")
    return labels, images


def _binary(path: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Read a batch of the binary format: one label byte before each image."""
    if len(data) % (1 + RECORD):
        raise UserError(f"{path} is {len(data)} bytes long, no multiple of {1 + RECORD}: the file is damaged")
    records = np.frombuffer(data, np.uint8).reshape(-1, 1 + RECORD)
    return records[:, 0], records[:, 1:]


def _pickled(path: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Read a batch of the python format: a pickled dict.

    b"labels" is a list of N numbers, and b"data" is an array (N, 3072).
    """
    try:
        _refuse_large_memo(data)
        batch = _Unpickler(bytes_io.BytesIO(data), encoding="bytes").load()
        listed, array = batch[b"labels"], batch[b"data"]
        if type(listed) is not list or not {type(label) for label in listed} <= {int}:
            # checked before NumPy converts it, because a list that repeats one list many times could grow to any size
            raise ValueError("labels are not a list of numbers")
        labels = np.array(listed, np.uint8)
        shape, raw = _described(array)
    except _Forbidden as error:
        raise UserError(f"{path} names {error}, which no batch of CIFAR-10 needs: nothing was executed") from None
    except MemoryError:
        raise UserError(f"{path} needs more memory than is available: the file is damaged") from None
    except Exception as error:  # noqa: BLE001 damaged pickles raise nearly anything
        raise UserError(f"{path} is not a batch of CIFAR-10 ({type(error).__name__}): the file is damaged") from None
    if labels.ndim != 1 or shape != (len(labels), RECORD) or len(raw) != math.prod(shape):
        raise UserError(f"{path}: {len(raw)} bytes of images of shape {shape} for {len(labels)} labels: damaged")
    return labels, np.frombuffer(raw, np.uint8).reshape(shape)


def _refuse_large_memo(data: bytes) -> None:
    """Raise ValueError for instructions with which a short pickle can allocate a lot of memory.

    These are memo indices larger than the pickle itself, and byte arrays of a size that the instruction only states.
    """
    for code, argument, _ in pickletools.genops(data):
        if code.name == "BYTEARRAY8" or ("PUT" in code.name and int(argument or 0) > len(data)):
            raise ValueError(f"{code.name} {argument}")


class _Forbidden(Exception):
    """A pickle names a class or function that no batch needs."""


class _Described:
    """Inert record of a class or object in a pickle.

    It stores the name, the arguments and the state, and executes nothing.
    """

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: tuple[Any, ...] = ()) -> None:
        self.name, self.arguments = name, arguments
        self.state: Any = None

    def __call__(self, *arguments: Any) -> _Described:
        return _Described(self.name, arguments)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Unpickler of plain values that imports nothing.

    The three names of NumPy in `NAMES` become inert records. All other names are rejected.
    """

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in NAMES:
            raise _Forbidden(f"{module}.{name}")
        return _Described(f"{module}.{name}")


def _described(array: _Described) -> tuple[tuple[int, ...], bytes]:
    """Return shape and bytes of a pickled array of unsigned bytes. Raises ValueError or TypeError for anything else."""
    _, shape, kind, by_columns, raw = array.state
    if array.name != ARRAY or kind.name != "numpy.dtype" or kind.arguments[0] != b"u1" or by_columns:
        raise ValueError("not an array of unsigned bytes")
    if not isinstance(raw, bytes):
        raise TypeError("not bytes")
    return tuple(int(n) for n in shape), raw
