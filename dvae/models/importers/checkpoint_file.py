"""Reader of checkpoints of torch.save.

A checkpoint is a zip archive with one pickle, and one record of numbers for each storage. The pickle is not executed.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from dvae.errors import UserError
from dvae.models.importers import unpickle
from dvae.models.importers.quoting import quoted
from dvae.models.importers.unpickle import InertObject, TensorRef, TensorStorage
from dvae.utils.read import DamagedFile, require_regular

LARGEST_PICKLE = 32 * 2**20
"""Largest accepted pickle in bytes. Published checkpoints have some hundred thousand bytes."""
LARGEST_DIRECTORY = 8 * 2**20
"""Largest accepted list of records (central directory) in bytes. A record needs about 100 bytes."""
MOST_TENSORS = 10_000
"""Most tensors of a state dict. Published checkpoints have at most some thousand."""
LONGEST_NAME = 300
"""Most characters of the name of a tensor."""
DAMAGED = (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OverflowError, struct.error, OSError)
"""Exceptions that zipfile raises if a file is not a complete archive."""
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Signature, length of the name, and length of the extra field.

The name and the extra field follow this header, and then the bytes of the record.
"""
CHUNK = 2**20
"""Bytes that are read at once to compute a checksum."""


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor of a checkpoint. Its numbers are read when `load` is called."""

    checkpoint: Checkpoint
    name: str
    ref: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ref.shape

    def load(self) -> torch.Tensor:
        """Read the tensor, as float64 if the file has float64, else as float32. Raises UserError if it is damaged."""
        return self.checkpoint.tensor(self.name, self.ref)


class _Reader(io.BufferedReader):
    """A file from which at most `limit` bytes can be read at once.

    It limits the memory that zipfile allocates, because the sizes in a hostile archive can be wrong.
    """

    limit = LARGEST_DIRECTORY

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(self.limit + 1 if size is None or size < 0 else min(size, self.limit + 1))
        if len(data) > self.limit:
            raise zipfile.BadZipFile("its list of records is too long")
        return data


class Checkpoint:
    """A checkpoint file. Nothing in it is executed.

    `contents` is the content of its pickle as data (dvae.models.importers.unpickle). Raises UserError if the file is
    missing, truncated or of another format, or if its pickle has a call that is not allowed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._size = require_regular(path).st_size
            self._file = _Reader(io.FileIO(path))
        except DamagedFile as error:
            raise UserError(f"{error}: give a checkpoint file") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): give a checkpoint file") from None
        except ValueError:  # Python raises it for a NUL character in the path
            raise UserError(f"ckpt={quoted(str(path))} is no path: give a checkpoint file") from None
        self._checked: dict[str, int] = {}
        """Name of a record whose checksum was verified -> position of its first byte in the file."""
        try:
            self._records = self._directory()
            if "byteorder" in self._records and self._record("byteorder", 16) != b"little":
                raise UserError(f"{path}: its numbers are big-endian: save it again on another machine")
            self.contents: Any = unpickle.read(self._record("data.pkl", LARGEST_PICKLE), str(path))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _directory(self) -> dict[str, zipfile.ZipInfo]:
        """Return the records of the archive, by their names below the folder of data.pkl."""
        try:
            records = zipfile.ZipFile(self._file).infolist()
        except DAMAGED:
            raise UserError(f"{self.path}: {self._not_an_archive()}") from None
        names = Counter(record.filename for record in records)
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise UserError(
                f"{self.path}: the record {quoted(twice[0])} is there more than once: torch never does that"
            )
        pickles = [name for name in names if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise UserError(f"{self.path}: a zip archive, but not one of torch.save ({len(pickles)} records data.pkl)")
        held = sum(record.compress_size for record in records)
        if held > self._size:  # overlapping records, with which a small file could describe any amount of data
            raise UserError(
                f"{self.path}: its records have {held} bytes, more than the {self._size} of the file: the file is cut "
                "off, or torch did not write it"
            )
        folder = pickles[0].removesuffix("data.pkl")
        return {
            record.filename.removeprefix(folder): record for record in records if record.filename.startswith(folder)
        }

    def _not_an_archive(self) -> str:
        """Return the reason why the file cannot be read as a zip archive."""
        self._file.seek(0)
        start = self._file.read(2)
        if not start:
            return "the file is empty: copy it again"
        if start == b"PK":
            return "the archive is cut off or damaged: copy it again"
        if start[:1] == b"\x80":
            return (
                "the format of torch before 1.6, which cannot be read without running it: load and save it again "
                "with a newer torch, if you trust it"
            )
        return "not a checkpoint of torch (no zip archive)"

    def _record(self, name: str, limit: int) -> bytes:
        """Return the bytes of a record. Raises UserError if it has more than `limit` bytes or is damaged."""
        start, size = self._find(name, limit)
        self._file.seek(start)
        data = bytearray(size)
        self._file.readinto(data)
        return bytes(data)

    def _find(self, name: str, limit: int, exactly: bool = False) -> tuple[int, int]:
        """Return the position of a record's first byte, and its size in bytes. The checksum is verified once.

        Raises UserError if the record is missing or damaged, or if its size is larger than `limit` (with `exactly`:
        differs from it).
        """
        record = self._records.get(name)
        if record is None:
            raise UserError(f"{self.path}: the record {quoted(name)} is missing: the file is not whole, copy it again")
        size = record.file_size
        # torch never compresses records, and a compressed record could unpack to a huge size
        plain = record.compress_type == zipfile.ZIP_STORED and record.compress_size == size
        if not plain or size > limit or (exactly and size != limit):
            raise UserError(
                f"{self.path}: the record {quoted(name)} has {size} bytes ({'plain' if plain else 'compressed'}), by "
                f"the rest of the file it should have {'' if exactly else 'at most '}{limit}, plain: not a file that "
                "torch wrote"
            )
        if name not in self._checked:
            self._checked[name] = self._check(name, record)
        return self._checked[name], size

    def _check(self, name: str, record: zipfile.ZipInfo) -> int:
        """Verify a record, and return the position of its first byte. Raises UserError if it is damaged or cut off."""
        damaged = UserError(f"{self.path}: the record {quoted(name)} is damaged or cut off: copy the file again")
        if not 0 <= record.header_offset <= self._size - LOCAL_HEADER.size:
            raise damaged
        self._file.seek(record.header_offset)
        signature, name_length, extra_length = LOCAL_HEADER.unpack(self._file.read(LOCAL_HEADER.size))
        start = record.header_offset + LOCAL_HEADER.size + name_length + extra_length
        if signature != b"PK\x03\x04" or start + record.file_size > self._size:
            raise damaged
        self._file.seek(start)
        checksum, left = 0, record.file_size
        while left > 0 and (chunk := self._file.read(min(left, CHUNK))):
            checksum = zlib.crc32(chunk, checksum)
            left -= len(chunk)
        if left or checksum != record.CRC:
            raise damaged
        return start

    def check_storage(self, storage: TensorStorage) -> None:
        """Raise UserError if the record of a storage is missing, is damaged, or has the wrong size."""
        self._find(f"data/{storage.key}", storage.numel * storage.dtype.itemsize, exactly=True)

    def tensor(self, name: str, ref: TensorRef) -> torch.Tensor:
        """Read the tensor at `ref`. `name` is for messages. Raises UserError if it is damaged or not finite."""
        storage, itemsize = ref.storage, ref.storage.dtype.itemsize
        if not storage.dtype.is_floating_point:
            raise UserError(f"{self.path}: {quoted(name)} holds {storage.dtype}, not real numbers: another layout")
        start, _ = self._find(f"data/{storage.key}", storage.numel * itemsize, exactly=True)
        data = bytearray(ref.extent * itemsize)
        self._file.seek(start + ref.offset * itemsize)
        self._file.readinto(data)
        flat = torch.frombuffer(data, dtype=storage.dtype)
        value = flat.as_strided(ref.shape, ref.stride).contiguous()
        if not torch.isfinite(value).all():
            raise UserError(f"{self.path}: {quoted(name)} holds NaN or infinity: the training had failed by then")
        return value if value.dtype == torch.float64 else value.float()

    def state(self) -> dict[str, CheckpointTensor]:
        """Return the tensors in "state_dict", by name.

        Raises UserError if there is no valid state dict. Every checkpoint of Lightning has one.
        """
        state = self.contents.get("state_dict") if isinstance(self.contents, dict) else None
        if not isinstance(state, dict) or not state:
            raise UserError(f"{self.path}: holds no 'state_dict': not a checkpoint of PyTorch Lightning")
        if len(state) > MOST_TENSORS:
            raise UserError(
                f"{self.path}: its state_dict has {len(state)} entries, more than any network: another layout"
            )
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, TensorRef):
                raise UserError(
                    f"{self.path}: state_dict[{quoted(name)}] is not a tensor: not a checkpoint of Lightning"
                )
            if not name.isprintable() or len(name) > LONGEST_NAME:
                raise UserError(f"{self.path}: its state_dict has the name {quoted(name)}: no module has such a name")
            if not value.within():
                raise UserError(
                    f"{self.path}: {quoted(name)} is empty or reaches beyond its record: the file is damaged, copy it "
                    "again"
                )
        return {name: CheckpointTensor(self, name, ref) for name, ref in state.items()}

    def settings(self) -> dict[Any, Any]:
        """Return the entries of "hyper_parameters", or {} if there are none.

        They are stored as a dict or as Lightning's own mapping class.
        """
        found = self.contents.get("hyper_parameters") if isinstance(self.contents, dict) else None
        if isinstance(found, InertObject):
            found = found.items or found.state
        return found if isinstance(found, dict) else {}
