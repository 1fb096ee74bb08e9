"""The attempts of a run: when it was started, where, by what, and how that ended. Imports nothing heavy.

attempts.jsonl has a row for each time that a run was started. A row without an end is that of the attempt which goes
on, where somebody holds the folder's lock, and else of one that was killed.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from dvae.errors import MachineError, UserError, describe, fold, printable_line
from dvae.utils import atomic_files
from dvae.utils.number_types import Positive, Seconds
from dvae.utils.read import DamagedFile, read_json_lines

FILE = "attempts.jsonl"
WORKER = ".lock"
"""Held by the process that works in the folder: rank 0 of a job, or a tool."""
LAUNCHER = ".attempt"
"""Held by the process that started the attempt, from its first moment to its last."""
INTERRUPTED, TERMINATED = 130, 143
"""Exit statuses of an attempt that was asked to stop."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One row of attempts.jsonl."""

    started: Seconds
    """Seconds since 1970."""
    host: str
    """Name of the machine."""
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    """Process to which a signal goes; it passes it on to its ranks."""
    launcher: str
    """local, processes, torchrun, slurm, ..."""
    count: Positive
    """Ranks."""
    cwd: str
    """Folder that relative paths of the config start from."""
    job: str = ""
    """Number of the job that it is part of, on a cluster."""
    ended: Seconds | None = None
    """Seconds since 1970; None where it goes on, or was killed."""
    status: Annotated[int, Field(ge=-255, le=255)] | None = None
    """Exit status; 0 where the run is finished, above 128 where the attempt was asked to stop."""
    message: str = ""
    """Its last words."""


def read(folder: Path) -> list[Attempt]:
    """All attempts, in their order. Raises MachineError if the file is damaged.

    Control characters in texts are replaced, because the texts are shown in a terminal.
    """
    path = folder / FILE
    if not path.exists():
        return []
    try:
        attempts = read_json_lines(path, Attempt)
    except DamagedFile as error:
        reason = str(error).removeprefix(str(path)).lstrip(": ")
        raise MachineError(f"{path}: is damaged ({reason}); delete it to go on, the run is safe") from None
    return [
        replace(
            attempt,
            host=printable_line(attempt.host),
            launcher=printable_line(attempt.launcher),
            job=printable_line(attempt.job),
            message=printable_line(attempt.message),
        )
        for attempt in attempts
    ]


def write(folder: Path, attempts: list[Attempt]) -> None:
    atomic_files.write_text(folder / FILE, "".join(json.dumps(asdict(attempt)) + "\n" for attempt in attempts))


@contextmanager
def hold(folder: Path, lock: str) -> Iterator[None]:
    """Hold a lock of a run folder. Raises UserError where another process has it."""
    with atomic_files.locked(folder / lock, refusal(folder)):
        yield


def refusal(folder: Path) -> UserError:
    """What is said where somebody else works in a run folder."""
    return UserError(f"run={folder} is in use by another process: wait for it, or use another run=")


def in_use(folder: Path) -> bool:
    """Whether an attempt goes on, or a tool works in the folder."""
    return atomic_files.is_locked(folder / LAUNCHER) or atomic_files.is_locked(folder / WORKER)


@contextmanager
def recorded(folder: Path, launcher: str, count: int, job: str = "") -> Iterator[None]:
    """The attempt of this process on a run, which is what the block does. Raises UserError where another goes on."""
    with hold(folder, LAUNCHER):
        with hold(folder, WORKER):  # refused before anything is recorded; rank 0 takes it again
            earlier = read(folder)
            begun = Attempt(
                started=round(time.time(), 3), host=socket.gethostname(), pid=os.getpid(), launcher=launcher,
                count=count, cwd=os.getcwd(), job=job,
            )  # fmt: skip
            write(folder, [*earlier, begun])
        try:
            yield
        except BaseException as error:
            said, status = describe(error) or (f"{type(error).__name__}: {fold(error)}", 1)
            try:
                write(folder, [*earlier, ended(begun, status, said)])
            except OSError as fault:  # a full disk, as a rule: the error itself matters more
                print(f"dvae: {folder / FILE} cannot be written ({fold(fault)})", file=sys.stderr)
            raise
        write(folder, [*earlier, ended(begun, 0, "finished")])


def ended(attempt: Attempt, status: int, message: str) -> Attempt:
    return replace(attempt, ended=round(time.time(), 3), status=status, message=message)


def close(folder: Path, status: int, message: str) -> Attempt:
    """The last attempt, which is over; if it could not write down its end itself, that is done here.

    Raises MachineError if none is on record.
    """
    with hold(folder, LAUNCHER):
        if not (found := read(folder)):
            raise MachineError(f"{folder}: no attempt is on record in {FILE}")
        *earlier, last = found
        if last.ended is None:
            last = ended(last, status, message)
            write(folder, [*earlier, last])
    return last
