"""A checkpoint of torch.save: a zip archive with a pickle and a record of numbers for each storage."""

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
"""Bytes; those of published checkpoints have some hundred thousand."""
LARGEST_DIRECTORY = 8 * 2**20
"""Bytes of the archive's list of records; a record takes about 100."""
MOST_TENSORS = 10_000
"""Tensors of a state dict; those of published checkpoints have at most some thousand."""
LONGEST_NAME = 300
"""Characters of a tensor's name."""
DAMAGED = (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OverflowError, struct.error, OSError)
"""What zipfile raises if a file is no whole archive."""
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Signature, and lengths of the name and of the extra field, which lie between this and the bytes of a record."""
CHUNK = 2**20
"""Bytes that are taken at once to compute a checksum."""


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor of a checkpoint that is read when it is asked for."""

    checkpoint: Checkpoint
    name: str
    ref: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ref.shape

    def load(self) -> torch.Tensor:
        """The tensor, float64 if the file has that, else float32. Raises UserError if it is damaged."""
        return self.checkpoint.tensor(self.name, self.ref)


class _Reader(io.BufferedReader):
    """A file of which no more than `limit` bytes are read at once, whatever sizes it tells of itself."""

    limit = LARGEST_DIRECTORY

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(self.limit + 1 if size is None or size < 0 else min(size, self.limit + 1))
        if len(data) > self.limit:
            raise zipfile.BadZipFile("its list of records is too long")
        return data


class Checkpoint:
    """A checkpoint file; nothing in it is executed. `contents` is its pickle as data (dvae.models.importers.unpickle).

    Raises UserError if the file is missing, truncated, of another format, or its pickle calls anything foreign.
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
        except ValueError:  # of a NUL in the path
            raise UserError(f"ckpt={quoted(str(path))} is no path: give a checkpoint file") from None
        self._checked: dict[str, int] = {}
        """Where the bytes of records begin whose checksum was found right."""
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
        """The records of the archive, by their names below its one folder."""
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
        if held > self._size:  # else a small file can have any number of large records, one upon the other
            raise UserError(
                f"{self.path}: its records have {held} bytes, more than the {self._size} of the file: the file is cut "
                "off, or torch did not write it"
            )
        folder = pickles[0].removesuffix("data.pkl")
        return {
            record.filename.removeprefix(folder): record for record in records if record.filename.startswith(folder)
        }

    def _not_an_archive(self) -> str:
        """What is wrong with a file that is no zip archive."""
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
        """The bytes of a record that has at most `limit`. Raises UserError if it has more, or is damaged."""
        start, size = self._find(name, limit)
        self._file.seek(start)
        data = bytearray(size)
        self._file.readinto(data)
        return bytes(data)

    def _find(self, name: str, limit: int, exactly: bool = False) -> tuple[int, int]:
        """Where the bytes of a record begin, and how many there are.

        Raises UserError if these are not `limit` at most, or exactly, or are damaged.
        """
        record = self._records.get(name)
        if record is None:
            raise UserError(f"{self.path}: the record {quoted(name)} is missing: the file is not whole, copy it again")
        size = record.file_size
        # torch never compresses: a compressed record might be a bomb
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
        """Where the bytes of a record begin. Raises UserError if its checksum is wrong, or it is cut off."""
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
        """Raise UserError if the record of a storage is missing, damaged, or has another size than it should."""
        self._find(f"data/{storage.key}", storage.numel * storage.dtype.itemsize, exactly=True)

    def tensor(self, name: str, ref: TensorRef) -> torch.Tensor:
        """The tensor at `ref`; `name` is for messages. Raises UserError if it is damaged or not finite."""
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
        """The tensors of "state_dict". Raises UserError if there is none, as in no checkpoint of Lightning."""
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
        """The plain entries of "hyper_parameters", Lightning's own mapping or a dict; {} if there are none."""
        found = self.contents.get("hyper_parameters") if isinstance(self.contents, dict) else None
        if isinstance(found, InertObject):
            found = found.items or found.state
        return found if isinstance(found, dict) else {}
