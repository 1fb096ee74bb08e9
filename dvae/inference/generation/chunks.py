"""Store the chunks of an unfinished result in a hidden folder beside the result, together with their request."""

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
"""Maximum size of a record in bytes. A record may hold several numbers per image."""


@forbid_extra
@dataclass(frozen=True)
class GenerationRecord:
    """The JSON file that is written beside finished images."""

    request: dict[str, Any]
    n: int
    nfe: float
    versions: dict[str, str]


class ChunkStore:
    """The chunks of one request. Each chunk is a file that is either complete or absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def folder_of(out: Path) -> Path:
        return out.with_name(f".{out.name}.drawing")

    @classmethod
    @contextmanager
    def opened(cls, out: Path, request: dict[str, Any]) -> Iterator[ChunkStore]:
        """Open the chunks for `out` and hold their lock while the block runs. Chunks of an earlier attempt are kept.

        Raises UserError if another command is generating `out` now, or if the stored chunks belong to another request.
        """
        folder = cls.folder_of(out)
        refuse_link(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_files.locked(
            folder / LOCK, UserError(f"out={out}: another command draws it now: wait, or name another")
        ):
            record = folder / REQUEST
            # without a request, nothing tells what chunks in this folder belong to: start from an empty folder
            if not record.exists():
                for path in folder.glob("*.npz"):
                    path.unlink()
                atomic_files.write_json(record, request)
            if unlike := first_difference(read_record(record), request):
                raise UserError(f"out={out} is unfinished, with {unlike}: name another, or remove {folder}")
            atomic_files.remove_leftovers(folder)  # temporary files of killed processes; nobody else holds the lock
            yield cls(folder)

    def path(self, numbers: range) -> Path:
        return self.folder / f"{numbers.start:09d}-{numbers.stop:09d}.npz"

    def missing(self, ranges: list[range]) -> list[range]:
        """Return the ranges whose chunks are not stored yet."""
        return [numbers for numbers in ranges if not self.path(numbers).exists()]

    def write(self, numbers: range, arrays: Mapping[str, np.ndarray]) -> None:
        """Store the arrays of a chunk by name. Row i of each array belongs to numbers[i]."""
        atomic_files.write_file(self.path(numbers), lambda aside: np.savez(aside, **dict(arrays)))  # type: ignore[arg-type]

    def fill(
        self,
        ranges: list[range],
        compute: Callable[[range], Mapping[str, np.ndarray]],
        on_chunk: Callable[[range], None],
    ) -> None:
        """Compute and store the chunks one by one. `on_chunk` is called after each chunk is stored."""
        for numbers in ranges:
            self.write(numbers, compute(numbers))
            on_chunk(numbers)

    def read(self, numbers: range, name: str, rows: int = 0) -> np.ndarray:
        """Read one array of a chunk.

        The array must have at least `rows` rows and at most one row per number. Raises MachineError if the file is
        damaged.
        """
        path = self.path(numbers)
        try:
            # `write` does not compress, so an array is never larger than its file: a larger one is refused
            arrays = read_npz(path, require_regular(path).st_size, [name])
            if name not in arrays or arrays[name].ndim == 0 or not rows <= len(arrays[name]) <= len(numbers):
                raise DamagedFile(path, f"does not hold the {name} of {rows} to {len(numbers)} images")
        except (DamagedFile, OSError) as error:
            raise self.damage(numbers, error.reason if isinstance(error, DamagedFile) else fold(error)) from None
        return arrays[name]

    def damage(self, numbers: range, reason: str) -> MachineError:
        """Return the error for a chunk whose content is not valid."""
        path = self.path(numbers)
        return MachineError(f"{path} is damaged ({reason}): remove it, then run the same command again")

    def remove(self) -> None:
        """Remove the folder. The chunks are removed first, so that a chunk never exists without its request."""
        refuse_link(self.folder)
        for path in sorted(self.folder.iterdir(), key=lambda path: path.suffix != ".npz"):
            path.unlink()
        self.folder.rmdir()

    @classmethod
    def remove_at(cls, out: Path) -> None:
        """Remove the folder of `out`, if a command was stopped before it had removed the folder."""
        folder = cls.folder_of(out)
        if folder.exists():
            cls(folder).remove()


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that results depend on, for records."""
    return {name: metadata.version(name) for name in ("dvae", "torch", "numpy")}


def refuse_link(folder: Path) -> None:
    """Raise UserError if the hidden folder is a symbolic link: files elsewhere would be removed through it."""
    if folder.is_symlink():
        raise UserError(f"{folder} is a link to another folder: remove it, or name another out=")


def read_record(record: Path) -> dict[str, Any]:
    """Read a record. Raises UserError if the file is not a valid record."""
    try:
        return read_json(record, dict[str, Any], RECORD_LIMIT)
    except DamagedFile as error:
        raise UserError(f"{record}: not a record of what was drawn ({error.reason}): remove it") from None


def read_generation_record(record: Path) -> GenerationRecord:
    """Read the record beside finished images. Raises UserError if the file is not a valid record."""
    try:
        return read_json(record, GenerationRecord)
    except DamagedFile as error:
        raise UserError(f"{record}: not a record of what was drawn ({error.reason}): remove it") from None


def first_difference(existing: Mapping[str, Any], requested: Mapping[str, Any]) -> str:
    """Describe the first field in which two requests differ. Returns "" if they are equal."""
    for key in [*requested, *(key for key in existing if key not in requested)]:
        old, new = existing.get(key), requested.get(key)
        if old != new:
            return f"{key}={_short(old)}, this asks for {_short(new)}"
    return ""


def _short(value: Any) -> str:
    """Format a value as on the command line. A hash is cut to 12 characters, other text to 200."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text[:12] if len(text) == 64 else text[:200] or "''"
