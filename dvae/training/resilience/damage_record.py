"""The record of a run's damaged images. Later attempts skip them from the start."""

from __future__ import annotations

from pathlib import Path

from dvae.data.shards.reader import Shards
from dvae.errors import MachineError, fold
from dvae.utils import atomic_files
from dvae.utils.read import DamagedFile, read_json

DAMAGED = "damaged.json"
"""File in the run folder: {split: {index of a damaged image: its file, key and the reason}}."""
MAX_REASON = 1000
"""Largest number of characters of a reason. Longer ones are cut."""


def load_damaged(run: Path, split: str) -> dict[int, str]:
    """Damaged images of a split that the run has found so far: index -> file, key and reason.

    Raises MachineError if the record cannot be read.
    """
    return _read_record(run).get(split, {})


def _read_record(run: Path) -> dict[str, dict[int, str]]:
    """The whole record of the run, by split. Raises MachineError if it cannot be read."""
    path = run / DAMAGED
    try:
        found: dict[str, dict[int, str]] = read_json(path, dict[str, dict[int, str]])
    except FileNotFoundError:
        return {}
    except (DamagedFile, OSError) as error:
        reason = error.reason if isinstance(error, DamagedFile) else fold(error)
        raise MachineError(f"{path} cannot be read ({reason}): remove it; damaged images will be found again") from None
    return {split: {index: reason[:MAX_REASON] for index, reason in known.items()} for split, known in found.items()}


def record_damage(run: Path, shards: Shards) -> None:
    """Add the damaged images that `shards` knows to the run's record. Call it on rank 0 only."""
    known = load_damaged(run, shards.split)
    if shards.damaged.keys() <= known.keys():
        return
    found = known | dict(shards.damaged)
    record = _read_record(run) | {shards.split: dict(sorted(found.items()))}
    atomic_files.write_json(
        run / DAMAGED, {split: {str(i): reason for i, reason in one.items()} for split, one in record.items()}
    )
