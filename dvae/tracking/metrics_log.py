"""Read and write metrics.jsonl: one JSON object per line with the metrics of one step.

No step of a stage occurs twice.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from dvae.errors import MachineError
from dvae.utils import atomic_files
from dvae.utils.read import DamagedFile, parse_json, read_bytes, require_regular

TAIL = 65536
"""Bytes that are read at the end of the file to find the newest rows."""
LIMIT = 2**28
"""Maximum size of the file in bytes if it is read whole: about 500,000 rows."""
NUMBERS = ("time", "images_per_second", "loss", "lr", "seconds")
"""Metrics that are shown during a run. If a row has one of them, its value must not be a string."""


class MetricsLog:
    """The rows of a run's metrics.jsonl.

    A row is a flat mapping with at least "stage" (str) and "step" (int >= 0). All other values are finite numbers, null
    or strings.

    `append` passes each row to the operating system before it returns. A killed process therefore loses at most the
    row that it was writing. Its incomplete line is ignored, because the resumed run repeats that step.
    """

    def __init__(self, path: Path, lists: Collection[str] = (), limit: int = LIMIT) -> None:
        """Open the log without reading it.

        Args:
            path: The file; it may be missing.
            lists: Names of values that may be lists of integers.
            limit: Maximum size of the file in bytes.
        """
        self.path = path
        self._lists, self._limit = lists, limit
        self._whole = False

    def append(self, row: dict[str, Any]) -> None:
        """Append one row. Numbers that are not finite are written as null.

        Raises MachineError if the file cannot be written.
        """
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        try:
            if not self._whole:
                self._drop_torn_line()
            with atomic_files.open_own(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as file:
                file.write((json.dumps(finite, ensure_ascii=False) + "\n").encode())
        except (OSError, DamagedFile) as error:
            raise MachineError(f"{self.path}: cannot be written ({error}); the rows before are safe") from None

    def rewind(self, stage: str, step: int) -> None:
        """Drop the rows of `stage` after `step`, from which training resumes. Rows of other stages are kept.

        Raises MachineError if the file is damaged or cannot be written.
        """
        pairs = self._read()
        kept = [line for line, row in pairs if row["stage"] != stage or row["step"] <= step]
        if len(kept) == len(pairs):
            return
        try:
            atomic_files.write_text(self.path, "".join(line + "\n" for line in kept))
        except OSError as error:
            raise MachineError(f"{self.path}: cannot be rewritten ({error}); it is unchanged") from None

    def rows(self, stage: str | None = None) -> list[dict[str, Any]]:
        """Return all rows, or the rows of one stage, in the order of the file.

        Raises MachineError if a line is damaged.
        """
        return [row for _, row in self._read() if stage in (None, row["stage"])]

    def tail(self) -> list[dict[str, Any]]:
        """Return the newest complete rows, from the last `TAIL` bytes of the file.

        Raises MachineError if a row is damaged.
        """
        if not self.path.exists():
            return []
        require_regular(self.path)
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            whole = file.read(TAIL).rpartition(b"\n")[0].splitlines()
        # In a larger file, the first line that was read may begin in the middle of a row.
        return [_row(line, self.path, self._lists) for line in (whole[1:] if size > TAIL else whole)]

    def newest(self) -> dict[str, Any] | None:
        """Return the last complete row, or None if there is none."""
        rows = self.tail()
        return rows[-1] if rows else None

    def _read(self) -> list[tuple[str, dict[str, Any]]]:
        """Return all complete lines, each as text and as a row."""
        if not self.path.exists():
            return []
        whole, _, _ = read_bytes(self.path, self._limit).rpartition(b"\n")
        pairs = []
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = _row(line, f"line {number}", self._lists)
            except DamagedFile as error:
                raise MachineError(
                    f"{self.path}: line {number} is damaged ({error.reason}); delete that line to go on"
                ) from None
            pairs.append((line.decode("utf-8"), row))
        return pairs

    def _drop_torn_line(self) -> None:
        """Remove an incomplete last line that a killed process left, so that the next row starts on a new line."""
        if self.path.exists():
            with atomic_files.open_own(self.path, os.O_RDWR) as file:
                end = size = file.seek(0, os.SEEK_END)
                newline = -1
                while end and newline < 0:
                    start = max(0, end - TAIL)
                    file.seek(start)
                    newline, end = file.read(end - start).rfind(b"\n"), start
                if end + newline + 1 < size:
                    file.truncate(end + newline + 1)
        self._whole = True


def _row(line: bytes, what: object, lists: Collection[str]) -> dict[str, Any]:
    """Parse one line. Raises DamagedFile if it is not a valid row.

    Args:
        line: The line.
        what: The name of the line or the file, for the message.
        lists: Names of values that may be lists of integers.
    """
    row = parse_json(line, what)
    if not isinstance(row, dict):
        raise DamagedFile(what, "is not a metrics row: not an object")
    stage, step = row.get("stage"), row.get("step")
    if not (isinstance(stage, str) and stage and type(step) is int and step >= 0):
        raise DamagedFile(what, 'is not a metrics row: it lacks "stage" (text) or "step" (a whole number from 0)')
    for key, value in row.items():
        if key in lists and isinstance(value, list) and all(type(one) is int for one in value):
            continue
        if not key.isprintable() or not _is_figure(value) or (key in NUMBERS and isinstance(value, str)):
            raise DamagedFile(what, f"is not a metrics row: {key[:80]!r} is {repr(value)[:80]}")
    return row


def _is_figure(value: object) -> bool:
    """Return whether a row may hold `value`: a finite number of 64 bits, null, or printable text."""
    if type(value) is int:
        return abs(value) < 2**63
    if type(value) is float:
        return math.isfinite(value)
    return value is None or (isinstance(value, str) and value.isprintable())
