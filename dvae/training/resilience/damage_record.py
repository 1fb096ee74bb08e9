"""The record of a run's damaged images: what one attempt has found is passed over by the next from the start."""

from __future__ import annotations

from pathlib import Path

from dvae.data.shards.reader import Shards
from dvae.errors import MachineError, fold
from dvae.utils import atomic_files
from dvae.utils.read import DamagedFile, read_json

DAMAGED = "damaged.json"
"""In the run folder: images that were found damaged, by split: index -> file, key and reason."""
MAX_REASON = 1000
"""Characters of a reason that are kept."""


def load_damaged(run: Path, split: str) -> dict[int, str]:
    """Images of a split that the run has found damaged so far: index -> file, key and reason."""
    return _read_record(run).get(split, {})


def _read_record(run: Path) -> dict[str, dict[int, str]]:
    """The run's record, by split. Raises MachineError if it cannot be read."""
    path = run / DAMAGED
    try:
        found: dict[str, dict[int, str]] = read_json(path, dict[str, dict[int, str]])
    except FileNotFoundError:
        return {}
    except (DamagedFile, OSError) as error:
        reason = error.reason if isinstance(error, DamagedFile) else fold(error)
        raise MachineError(f"{path} cannot be read ({reason}): remove it, what is damaged is found again") from None
    return {split: {index: reason[:MAX_REASON] for index, reason in known.items()} for split, known in found.items()}


def record_damage(run: Path, shards: Shards) -> None:
    """Add what `shards` knows to be damaged to the run's record; on rank 0 alone."""
    known = load_damaged(run, shards.split)
    if shards.damaged.keys() <= known.keys():
        return
    found = known | dict(shards.damaged)
    record = _read_record(run) | {shards.split: dict(sorted(found.items()))}
    atomic_files.write_json(
        run / DAMAGED, {split: {str(i): reason for i, reason in one.items()} for split, one in record.items()}
    )
