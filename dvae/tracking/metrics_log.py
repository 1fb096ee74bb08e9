"""metrics.jsonl: what a run measured, one JSON object a line, no step of a stage twice."""

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
"""Bytes at the end of the file in which the newest rows are looked for."""
LIMIT = 2**28
"""Bytes of the file, where all of it is read: some 500,000 rows."""
NUMBERS = ("time", "images_per_second", "loss", "lr", "seconds")
"""Figures that are shown while a run goes on; where a row has one, it is no text."""


class MetricsLog:
    """The rows of a run's metrics.jsonl. A row is flat and holds at least "stage" (str) and "step" (int, from 0).

    Everything else in a row is a finite number, null or text. Every row is on its way to the disk before `append`
    returns, so a killed process loses none but the one that it was writing; that torn last line is left out, for its
    step is taken again.
    """

    def __init__(self, path: Path, lists: Collection[str] = (), limit: int = LIMIT) -> None:
        """A row may hold lists of whole numbers by the names `lists`. The file has at most `limit` bytes."""
        self.path = path
        self._lists, self._limit = lists, limit
        self._whole = False

    def append(self, row: dict[str, Any]) -> None:
        """Add one row; a number that is not finite is written as null. Raises MachineError where the file cannot be."""
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        try:
            if not self._whole:
                self._drop_torn_line()
            with atomic_files.open_own(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as file:
                file.write((json.dumps(finite, ensure_ascii=False) + "\n").encode())
        except (OSError, DamagedFile) as error:
            raise MachineError(f"{self.path}: cannot be written ({error}); the rows before are safe") from None

    def rewind(self, stage: str, step: int) -> None:
        """Drop the rows of `stage` beyond `step`, where training resumes; rows of other stages stay as they are."""
        pairs = self._read()
        kept = [line for line, row in pairs if row["stage"] != stage or row["step"] <= step]
        if len(kept) == len(pairs):
            return
        try:
            atomic_files.write_text(self.path, "".join(line + "\n" for line in kept))
        except OSError as error:
            raise MachineError(f"{self.path}: cannot be rewritten ({error}); it is as it was") from None

    def rows(self, stage: str | None = None) -> list[dict[str, Any]]:
        """All rows, or those of one stage, in the order of writing. Raises MachineError where a line is damaged."""
        return [row for _, row in self._read() if stage in (None, row["stage"])]

    def tail(self) -> list[dict[str, Any]]:
        """The newest whole rows, without reading the file from its beginning. Raises MachineError for a damaged one."""
        if not self.path.exists():
            return []
        require_regular(self.path)
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            whole = file.read(TAIL).rpartition(b"\n")[0].splitlines()
        return [_row(line, self.path, self._lists) for line in (whole[1:] if size > TAIL else whole)]

    def newest(self) -> dict[str, Any] | None:
        """The last whole row; None where there is none."""
        rows = self.tail()
        return rows[-1] if rows else None

    def _read(self) -> list[tuple[str, dict[str, Any]]]:
        """The whole lines, as text and as rows."""
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
        """Cut off what a killed process left of its last line, so that the next row starts a line of its own."""
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
    """The row in one line; `what` names it, and `lists` its lists of numbers. Raises DamagedFile if it is none."""
    row = parse_json(line, what)
    if not isinstance(row, dict):
        raise DamagedFile(what, "is no row: not an object")
    stage, step = row.get("stage"), row.get("step")
    if not (isinstance(stage, str) and stage and type(step) is int and step >= 0):
        raise DamagedFile(what, 'is no row: it has no "stage" (text) and "step" (a whole number from 0)')
    for key, value in row.items():
        if key in lists and isinstance(value, list) and all(type(one) is int for one in value):
            continue
        if not key.isprintable() or not _is_figure(value) or (key in NUMBERS and isinstance(value, str)):
            raise DamagedFile(what, f"is no row: {key[:80]!r} is {repr(value)[:80]}")
    return row


def _is_figure(value: object) -> bool:
    """Whether a row may hold `value`: a finite number of 64 bits, null, or text without control characters."""
    if type(value) is int:
        return abs(value) < 2**63
    if type(value) is float:
        return math.isfinite(value)
    return value is None or (isinstance(value, str) and value.isprintable())
