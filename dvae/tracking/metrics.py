"""metrics.jsonl: what a run measured, one JSON object a line, no step of a stage twice."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from dvae import files
from dvae.errors import MachineError, one_line

TAIL = 65536
"""Bytes at the end of the file in which the newest rows are looked for."""


class MetricsLog:
    """The rows of a run's metrics.jsonl. A row is flat and holds at least "stage" (str) and "step" (int).

    Every row is on its way to the disk before `append` returns, so a killed process loses none but the one that it
    was writing; that torn last line is left out, for its step is taken again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._whole = False

    def append(self, row: dict[str, Any]) -> None:
        """Add one row; a number that is not finite is written as null. Raises MachineError where the file cannot be."""
        finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        try:
            if not self._whole:
                self._drop_torn_line()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite, ensure_ascii=False) + "\n")
        except OSError as error:
            raise MachineError(f"{self.path}: cannot be written ({error}); the rows before are safe") from None

    def rewind(self, stage: str, step: int) -> None:
        """Drop the rows of `stage` beyond `step`, where training resumes; rows of other stages stay as they are."""
        pairs = self._read()
        kept = [line for line, row in pairs if row["stage"] != stage or row["step"] <= step]
        if len(kept) == len(pairs):
            return
        try:
            files.write_text(self.path, "".join(line + "\n" for line in kept))
        except OSError as error:
            raise MachineError(f"{self.path}: cannot be rewritten ({error}); it is as it was") from None

    def rows(self, stage: str | None = None) -> list[dict[str, Any]]:
        """All rows, or those of one stage, in the order of writing. Raises MachineError where a line is damaged."""
        return [row for _, row in self._read() if stage in (None, row["stage"])]

    def tail(self) -> list[dict[str, Any]]:
        """The newest whole rows, without reading the file from its beginning. Raises MachineError for a damaged one."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            whole = file.read().rpartition(b"\n")[0].splitlines()
        try:
            return [json.loads(line) for line in (whole[1:] if size > TAIL else whole)]
        except ValueError as error:
            raise MachineError(f"{self.path}: is damaged ({one_line(error)})") from None

    def newest(self) -> dict[str, Any] | None:
        """The last whole row; None where there is none."""
        rows = self.tail()
        return rows[-1] if rows else None

    def _read(self) -> list[tuple[str, dict[str, Any]]]:
        """The whole lines, as text and as rows."""
        if not self.path.exists():
            return []
        whole, _, _ = self.path.read_bytes().rpartition(b"\n")
        pairs = []
        for number, line in enumerate(whole.decode("utf-8", errors="replace").splitlines(), start=1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict) or not {"stage", "step"} <= set(row):
                raise MachineError(f"{self.path}: line {number} is damaged; delete that line to go on")
            pairs.append((line, row))
        return pairs

    def _drop_torn_line(self) -> None:
        """Cut off what a killed process left of its last line, so that the next row starts a line of its own."""
        if self.path.exists():
            data = self.path.read_bytes()
            if data and not data.endswith(b"\n"):
                with self.path.open("r+b") as file:
                    file.truncate(data.rfind(b"\n") + 1)
        self._whole = True
