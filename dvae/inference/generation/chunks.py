"""Chunks of an unfinished result: a hidden folder beside the result, with the request that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dvae.errors import MachineError, UserError, fold
from dvae.utils import atomic_files
from dvae.utils.read import MIB, DamagedFile, forbid_extra, read_json, read_npz, require_regular

REQUEST = "request.json"
LOCK = "lock"
RECORD_LIMIT = 256 * MIB
"""Bytes of a record, at most: it may hold some numbers of each image."""


@forbid_extra
@dataclass(frozen=True)
class GenerationRecord:
    """The JSON file beside finished images."""

    request: dict[str, Any]
    n: int
    nfe: float
    versions: dict[str, str]


class ChunkStore:
    """The chunks of one request, each a file that is complete or absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def folder_of(out: Path) -> Path:
        return out.with_name(f".{out.name}.drawing")

    @classmethod
    @contextmanager
    def opened(cls, out: Path, request: dict[str, Any]) -> Iterator[ChunkStore]:
        """The chunks for `out`, those of an earlier attempt too; no other command has them meanwhile.

        Raises UserError where another command draws there now, or another request was begun there.
        """
        folder = cls.folder_of(out)
        refuse_link(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_files.locked(
            folder / LOCK, UserError(f"out={out}: another command draws it now: wait, or name another")
        ):
            record = folder / REQUEST
            if not record.exists():  # the folder of a command that was ended before it could begin
                for path in folder.glob("*.npz"):
                    path.unlink()
                atomic_files.write_json(record, request)
            if unlike := first_difference(read_record(record), request):
                raise UserError(f"out={out} is half-drawn with {unlike}: name another, or remove {folder}")
            atomic_files.remove_leftovers(folder)
            yield cls(folder)

    def path(self, numbers: range) -> Path:
        return self.folder / f"{numbers.start:09d}-{numbers.stop:09d}.npz"

    def missing(self, ranges: list[range]) -> list[range]:
        """Those of the chunks that are not kept yet."""
        return [numbers for numbers in ranges if not self.path(numbers).exists()]

    def write(self, numbers: range, arrays: Mapping[str, np.ndarray]) -> None:
        """Keep the arrays of a chunk, by name; row i of each belongs to numbers[i]."""
        atomic_files.write_file(self.path(numbers), lambda aside: np.savez(aside, **dict(arrays)))  # type: ignore[arg-type]

    def fill(
        self,
        ranges: list[range],
        compute: Callable[[range], Mapping[str, np.ndarray]],
        on_chunk: Callable[[range], None],
    ) -> None:
        """Compute and keep chunk by chunk; `on_chunk` is called once each is kept."""
        for numbers in ranges:
            self.write(numbers, compute(numbers))
            on_chunk(numbers)

    def read(self, numbers: range, name: str, rows: int = 0) -> np.ndarray:
        """One of the arrays of a chunk, which has at least `rows` rows. Raises MachineError if the file is damaged."""
        path = self.path(numbers)
        try:
            # what `write` keeps is not compressed, so arrays are never larger than their file
            arrays = read_npz(path, require_regular(path).st_size, [name])
            if name not in arrays or arrays[name].ndim == 0 or not rows <= len(arrays[name]) <= len(numbers):
                raise DamagedFile(path, f"does not hold the {name} of {rows} to {len(numbers)} images")
        except (DamagedFile, OSError) as error:
            raise self.damage(numbers, error.reason if isinstance(error, DamagedFile) else fold(error)) from None
        return arrays[name]

    def damage(self, numbers: range, reason: str) -> MachineError:
        """What to raise for a chunk that is not what was written."""
        path = self.path(numbers)
        return MachineError(f"{path} is damaged ({reason}): remove it, then the same command again draws it anew")

    def remove(self) -> None:
        """Remove the folder: chunks first, so that no chunk is ever without its request."""
        refuse_link(self.folder)
        for path in sorted(self.folder.iterdir(), key=lambda path: path.suffix != ".npz"):
            path.unlink()
        self.folder.rmdir()

    @classmethod
    def remove_at(cls, out: Path) -> None:
        """Remove what a command that was ended while it removed the folder has left."""
        folder = cls.folder_of(out)
        if folder.exists():
            cls(folder).remove()


def package_versions() -> dict[str, str]:
    """Versions of the packages that results depend on, for records."""
    return {name: metadata.version(name) for name in ("dvae", "torch", "numpy")}


def refuse_link(folder: Path) -> None:
    """Raise UserError for a link in the place of the hidden folder: files elsewhere would be removed through it."""
    if folder.is_symlink():
        raise UserError(f"{folder} is a link to another folder: remove it, or name another out=")


def read_record(record: Path) -> dict[str, Any]:
    """A record as it was written. Raises UserError if it is none."""
    try:
        return read_json(record, dict[str, Any], RECORD_LIMIT)
    except DamagedFile as error:
        raise UserError(f"{record}: not a record of what was drawn ({error.reason}): remove it") from None


def read_generation_record(record: Path) -> GenerationRecord:
    """The record beside finished images; raises as `read_record`."""
    try:
        return read_json(record, GenerationRecord)
    except DamagedFile as error:
        raise UserError(f"{record}: not a record of what was drawn ({error.reason}): remove it") from None


def first_difference(existing: Mapping[str, Any], requested: Mapping[str, Any]) -> str:
    """The first field in which two requests differ, in words; empty where none does."""
    for key in [*requested, *(key for key in existing if key not in requested)]:
        old, new = existing.get(key), requested.get(key)
        if old != new:
            return f"{key}={_short(old)}, this asks for {_short(new)}"
    return ""


def _short(value: Any) -> str:
    """A value as one writes it; a hash by its beginning."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text[:12] if len(text) == 64 else text[:200] or "''"
