"""Parquet files of images, the format of many published data sets."""

from __future__ import annotations

import glob
import importlib
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import MISSING

from dvae.data.images import Crop, DamagedImage, Resize, decode, fit, protocol
from dvae.errors import UserError, fold, suggest
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.sources.base import SOURCES, Item, Source
from dvae.utils.read import DamagedFile, check, parse_json, require_regular

GROUP_LIMIT = 2 * 2**30
"""Largest row group in bytes of memory. A row group is read as a whole."""
BATCH = 16
"""Rows that are read between two checks of the memory.

A small file can need a lot of memory, because the format stores a value that repeats in many rows only once.
"""


@SOURCES.register("parquet")
class Parquet(Source):
    """Parquet files with a column of image files.

    Each cell of the column is a struct with the field "bytes" (as in Hugging Face data sets) or plain bytes. Class
    labels become names if the metadata of the file contains the names. This source needs pyarrow: pip install
    'dvae[parquet]'.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        path: str = MISSING
        """A file, a folder (all .parquet files in it are read), or a pattern such as DIR/train-*.parquet."""
        image: str = "image"
        """Name of the column with the images."""
        labels: list[str] = field(default_factory=list)
        """Names of columns that become labels. Their values must be integers, booleans or text."""
        crop: Crop = Crop.center
        """center: crop the center square. none: keep the whole image, and squeeze it if it is not square."""
        resize: Resize = Resize.lanczos
        """Filter for scaling to the requested image size."""
        license: str = Source.license
        """License of the images, with the credit that it requires. It is stored in the manifest."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        self.config, self.shapes = config, shapes
        self.license, self.protocol = config.license, protocol(config.crop, config.resize)
        self.files = _files(config.path)
        self._class_names: dict[str, list[str]] = {}
        rows = [self._row_groups(file) for file in self.files]
        self._groups = [
            (file, group) for file, counts in zip(self.files, rows, strict=True) for group in range(len(counts))
        ]
        self._starts = np.cumsum([0, *(count for counts in rows for count in counts)])
        if not len(self):
            raise UserError(f"source.path={config.path} holds no rows: name files with images")
        self._local = threading.local()

    def _row_groups(self, file: str) -> list[int]:
        """Return the number of rows of each row group of a file.

        Raises UserError if the file is not a Parquet file, lacks a column, or is damaged.
        """
        parquet = _pyarrow()
        try:
            size = require_regular(file).st_size
            opened = parquet.ParquetFile(file)
        except DamagedFile as error:
            raise UserError(f"source.path={error}") from None
        except (OSError, ValueError) as error:  # all errors of pyarrow derive from one of these
            raise UserError(f"{file} is not a readable Parquet file: {fold(error)[:200]}") from None
        with opened:
            schema = opened.schema_arrow
            for column in (self.config.image, *self.config.labels):
                if column not in schema.names:
                    name = "image" if column == self.config.image else "labels"
                    raise UserError(f"source.{name}: {file} has no column {column!r}: {suggest(column, schema.names)}")
            _check_types(file, schema, self.config)
            self._class_names |= _class_names(schema.metadata or {})
            counts = [opened.metadata.row_group(group).num_rows for group in range(opened.num_row_groups)]
            if min(counts, default=0) < 0 or sum(counts) > size:  # each row needs at least one byte for its image
                raise UserError(f"{file} states {sum(counts)} rows in {size} bytes: the file is damaged")
            return counts

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Item:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        file, group = self._groups[number]
        row = index - int(self._starts[number])
        name = f"{Path(file).name}:{group}:{row}"
        cells = self._read(number, name)
        image = cells[self.config.image][row].as_py()
        data = image.get("bytes") if isinstance(image, dict) else image
        if not data:
            raise DamagedImage(f"{name}: column {self.config.image!r} holds no bytes")
        pixels = fit(
            decode(data, name), self.shapes.image_size, self.shapes.channels, self.config.crop, name, self.config.resize
        )
        return Item(name, pixels, {c: self._label(c, cells[c][row].as_py(), name) for c in self.config.labels})

    def _read(self, number: int, name: str) -> Any:
        """Return row group `number`.

        Each thread keeps the row group that it read last, because successive images are usually in one group. Raises
        DamagedImage if the group cannot be read.
        """
        if getattr(self._local, "number", None) != number:
            file, group = self._groups[number]
            columns = [self.config.image, *self.config.labels]
            try:
                with _pyarrow().ParquetFile(file) as opened:
                    self._local.cells = _read_group(opened, group, columns)
            except (OSError, ValueError) as error:
                raise DamagedImage(f"{name}: row group {group} of {file} ({fold(error)[:200]})") from None
            self._local.number = number
        return self._local.cells

    def _label(self, column: str, value: Any, name: str) -> str | int:
        if value is None:
            raise DamagedImage(f"{name}: column {column!r} is empty")
        if column in self._class_names and isinstance(value, int) and 0 <= value < len(self._class_names[column]):
            return self._class_names[column][value]
        return value if isinstance(value, str) else int(value)

    def __getstate__(self) -> dict[str, Any]:
        # a threading.local cannot be pickled, and the rows in it can be read again
        return {key: value for key, value in self.__dict__.items() if key != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())


def _read_group(opened: Any, group: int, columns: list[str]) -> Any:
    """Return the table of a row group.

    Raises ValueError if it needs more memory than GROUP_LIMIT, or has another number of rows than the metadata says.
    """
    import pyarrow

    about = opened.metadata.row_group(group)
    stated = sum(
        about.column(i).total_uncompressed_size
        for i in range(about.num_columns)
        if about.column(i).path_in_schema.partition(".")[0] in columns
    )
    batches, size = [], 0
    if stated <= GROUP_LIMIT:
        for batch in opened.iter_batches(BATCH, row_groups=[group], columns=columns):
            batches.append(batch)
            size += batch.nbytes
            if size > GROUP_LIMIT:
                break
    if max(stated, size) > GROUP_LIMIT:
        raise ValueError(f"it takes more than {GROUP_LIMIT} bytes: write smaller row groups")
    table = pyarrow.Table.from_batches(batches)
    if len(table) != about.num_rows:
        raise ValueError(f"it has {len(table)} rows, not {about.num_rows}")
    return table


def _pyarrow() -> Any:
    """Return the module pyarrow.parquet. Raises UserError if it is not installed."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise UserError("source=parquet needs pyarrow: pip install 'dvae[parquet]'") from None


def _files(path: str) -> list[str]:
    """Return the files that `path` names, sorted. Raises UserError if there are none."""
    root = Path(path).expanduser()
    # an existing file is taken as it is, even if its name looks like a pattern
    exact = [str(root)] if root.exists() and not root.is_dir() else []
    files = sorted(map(str, root.rglob("*.parquet")) if root.is_dir() else exact or glob.glob(str(root)))
    if not files:
        raise UserError(f"source.path={path} names no Parquet file: name a file, a folder or DIR/train-*.parquet")
    return files


def _check_types(file: str, schema: Any, config: Parquet.Config) -> None:
    """Raise UserError if a column does not hold images or labels."""
    import pyarrow

    kinds = pyarrow.types
    image = schema.field(config.image).type
    if kinds.is_struct(image):
        image = next((image.field(i).type for i in range(image.num_fields) if image.field(i).name == "bytes"), image)
    if not (kinds.is_binary(image) or kinds.is_large_binary(image)):
        raise UserError(f"source.image={config.image}: {file} has {image} there, not the bytes of image files")
    for column in config.labels:
        kind = schema.field(column).type
        if not (
            kinds.is_integer(kind) or kinds.is_boolean(kind) or kinds.is_string(kind) or kinds.is_large_string(kind)
        ):
            raise UserError(f"source.labels: column {column!r} of {file} holds {kind}: use whole numbers, bool or text")


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Return column -> names of its classes, from the metadata that Hugging Face's datasets library writes.

    Returns {} if the metadata is malformed. Labels are then numbers.
    """
    try:
        features = parse_json(metadata.get(b"huggingface", b"{}"), "metadata").get("info", {}).get("features", {})
        named = {
            name: f["names"] for name, f in features.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"
        }
        return check(dict[str, list[str]], named, "metadata")
    except (DamagedFile, AttributeError, KeyError):
        return {}  # other software may have written the metadata; the labels stay numbers
