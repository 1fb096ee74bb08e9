"""A checkpoint of torch.save: a zip archive with a pickle and a record of numbers for each storage."""

from __future__ import annotations

import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from dvae.errors import UserError, one_line
from dvae.importers import unpickle
from dvae.importers.unpickle import Foreign, TensorRef

LARGEST_PICKLE = 256 * 2**20
"""Bytes; those of published checkpoints have some hundred thousand."""
DAMAGED = (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, RuntimeError)
"""What zipfile raises on a file that is no whole archive, or is encrypted."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint that is read when it is asked for."""

    checkpoint: Checkpoint
    name: str
    ref: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ref.shape

    def load(self) -> torch.Tensor:
        """The tensor, float64 where the file has that, else float32. Raises UserError where it is damaged."""
        return self.checkpoint.tensor(self.name, self.ref)


class Checkpoint:
    """A checkpoint file; nothing in it is executed. `contents` is its pickle as data (dvae.importers.unpickle).

    Raises UserError where the file is missing, truncated, of another format, or its pickle calls anything foreign.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._archive = zipfile.ZipFile(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): give a checkpoint file") from None
        except DAMAGED:
            raise UserError(f"{path}: {self._not_an_archive()}") from None
        twice = [name for name, count in Counter(self._archive.namelist()).items() if count > 1]
        if twice:
            raise UserError(f"{path}: the record {twice[0]!r} is there more than once: not a file that torch wrote")
        pickles = [name for name in self._archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise UserError(f"{path}: a zip archive, but not one of torch.save ({len(pickles)} records data.pkl)")
        self._folder = pickles[0].removesuffix("data.pkl")
        if self._folder + "byteorder" in self._archive.namelist() and self._record("byteorder", 16) != b"little":
            raise UserError(f"{path}: its numbers are big-endian: save it again on another machine")
        self.contents: Any = unpickle.read(self._record("data.pkl", LARGEST_PICKLE), str(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._archive.close()

    def _not_an_archive(self) -> str:
        """What is wrong with a file that is no zip archive."""
        with self.path.open("rb") as file:
            start = file.read(2)
        if start == b"PK":
            return "the archive is cut off or damaged: copy it again"
        if start[:1] == b"\x80":
            return (
                "the format of torch before 1.6, which cannot be read without running it: load and save it again "
                "with a newer torch, if you trust it"
            )
        return "not a checkpoint of torch (no zip archive)"

    def _record(self, name: str, limit: int, exactly: bool = False) -> bytes:
        """The bytes of a record. Raises UserError where they are not `limit` at most, or exactly, or are damaged."""
        full = self._folder + name
        if full not in self._archive.NameToInfo:
            raise UserError(f"{self.path}: the record {name!r} is missing: the file is not whole, copy it again")
        info = self._archive.getinfo(full)
        # torch never compresses: a compressed record might be a bomb
        plain = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        if not plain or info.file_size > limit or (exactly and info.file_size != limit):
            wanted = "" if exactly else "at most "
            raise UserError(
                f"{self.path}: the record {name!r} has {info.file_size} bytes ({'plain' if plain else 'compressed'}), "
                f"by the rest of the file it should have {wanted}{limit}, plain: not a file that torch wrote"
            )
        try:
            data = self._archive.read(info)
        except DAMAGED as error:
            raise UserError(f"{self.path}: {name!r} is damaged ({one_line(error)}): copy the file again") from None
        if len(data) != info.file_size:
            raise UserError(f"{self.path}: {name!r} is cut off: copy the file again")
        return data

    def tensor(self, name: str, ref: TensorRef) -> torch.Tensor:
        """The tensor at `ref`; `name` is for messages. Raises UserError where it is damaged or not finite."""
        storage = ref.storage
        if not storage.dtype.is_floating_point:
            raise UserError(f"{self.path}: {name!r} holds {storage.dtype}, not real numbers: another layout")
        data = self._record(f"data/{storage.key}", storage.numel * storage.dtype.itemsize, exactly=True)
        flat = torch.frombuffer(bytearray(data), dtype=storage.dtype)
        value = flat.as_strided(ref.shape, ref.stride, ref.offset).contiguous()
        if not torch.isfinite(value).all():
            raise UserError(f"{self.path}: {name!r} holds NaN or infinity: the training had failed by then")
        return value if value.dtype == torch.float64 else value.float()

    def state(self) -> dict[str, Stored]:
        """The tensors of "state_dict". Raises UserError where there is none, as in no checkpoint of Lightning."""
        state = self.contents.get("state_dict") if isinstance(self.contents, dict) else None
        if not isinstance(state, dict) or not state:
            raise UserError(f"{self.path}: holds no 'state_dict': not a checkpoint of PyTorch Lightning")
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, TensorRef):
                raise UserError(f"{self.path}: state_dict[{name!r}] is not a tensor: not a checkpoint of Lightning")
            if not value.within():
                raise UserError(f"{self.path}: {name!r} reaches beyond its record: the file is damaged, copy it again")
        return {name: Stored(self, name, ref) for name, ref in state.items()}

    def settings(self) -> dict[Any, Any]:
        """The plain entries of "hyper_parameters", Lightning's own mapping or a dict; {} where there are none."""
        found = self.contents.get("hyper_parameters") if isinstance(self.contents, dict) else None
        if isinstance(found, Foreign):
            found = found.items or found.state
        return found if isinstance(found, dict) else {}
