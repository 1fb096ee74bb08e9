"""The format version of a run folder, and the records of its finished stages.

This module imports no large packages, because tools that only list runs use it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvae.errors import UserError
from dvae.utils import atomic_files, package
from dvae.utils.format_version import refuse_format
from dvae.utils.read import DamagedFile, read_json

FORMAT = 2
"""Format version of the run folders that this version of dvae reads and writes."""
READERS = {1: "dvae 0.1"}
"""Older formats of a run folder, and the version of dvae that reads each."""
FORMAT_FILE = "run.json"
CONFIG = "config.yaml"
RECORDS = "stages.json"
NUMBERS = ("seconds", "steps", "images_per_second", "parameters")
"""Optional entries of a stage's record. Their values must be numbers."""


@dataclass
class FolderFormat:
    """The content of run.json."""

    format: int
    dvae: str


def write_format(folder: Path) -> None:
    """Write the format version and the version of dvae into `folder`."""
    atomic_files.write_json(folder / FORMAT_FILE, {"format": FORMAT, "dvae": package.VERSION})


def check_format(folder: Path) -> None:
    """Raise UserError if `folder` is not a run folder, or has another format version.

    The message for another format names the version of dvae that reads it.
    """
    if not (folder / CONFIG).exists():
        raise UserError(f"run={folder}: no run is there (it has no {CONFIG}): name a run folder")
    path = folder / FORMAT_FILE
    if not path.exists():
        raise UserError(
            f"{folder}: run folder of format 1 (it has no {FORMAT_FILE}), this program reads {FORMAT}: {READERS[1]} "
            f"reads it; or {FORMAT_FILE} was lost: copy the folder again"
        )
    found = read_json(path, FolderFormat).format
    refuse_format("run folder", folder, found, FORMAT, READERS)


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the record of each finished stage of a run, by stage. Empty if no stage is finished.

    Raises DamagedFile (a MachineError) if the file is damaged.
    """
    path = folder / RECORDS
    if not path.exists():
        return {}
    records = read_json(path, dict[str, dict[str, Any]])
    for stage, record in records.items():
        for name in NUMBERS:
            value = record.get(name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise DamagedFile(path, f"{stage}.{name} is {str(value)[:40]!r}, not a number")
    return records
