"""The attempts of a run: when and where each was started, by which launcher, and how it ended.

attempts.jsonl has a row for each start of the run. If the last row has no end, the attempt is running, or it was
killed. It is running if a process holds the lock of the run folder. This module imports no large packages.
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
"""Lock file that is held by the process that works in the folder: rank 0 of a job, or a tool."""
LAUNCHER = ".attempt"
"""Lock file that is held by the process that started the attempt, until the attempt ends."""
INTERRUPTED, TERMINATED = 130, 143
"""Exit statuses of an attempt that was asked to stop, by Ctrl-C or otherwise."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One row of attempts.jsonl."""

    started: Seconds
    """Time of the start, in seconds since 1970."""
    host: str
    """Name of the machine."""
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    """ID of the process that receives signals and passes them on to the ranks."""
    launcher: str
    """Name of the launcher: local, processes, slurm, ...; torchrun for local under torchrun."""
    count: Positive
    """Number of ranks."""
    cwd: str
    """Working directory of the launch. Relative paths of the config start there."""
    job: str = ""
    """Number of the cluster job. Empty if there is none."""
    ended: Seconds | None = None
    """Time of the end, in seconds since 1970. None if the attempt is running or was killed."""
    status: Annotated[int, Field(ge=-255, le=255)] | None = None
    """Exit status. 0: the run is finished; above 128: the attempt was asked to stop."""
    message: str = ""
    """Reason of the end, in one line."""


def read(folder: Path) -> list[Attempt]:
    """Return all attempts, in their order. Raises MachineError if the file is damaged.

    Control characters in texts are replaced, because the texts are printed in a terminal.
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
    """Hold a lock of a run folder while the block runs. Raises UserError if another process holds it."""
    with atomic_files.locked(folder / lock, refusal(folder)):
        yield


def refusal(folder: Path) -> UserError:
    """Return the error for a run folder in which another process works."""
    return UserError(f"run={folder} is in use by another process: wait for it, or use another run=")


def in_use(folder: Path) -> bool:
    """Return whether an attempt is running, or a tool works in the folder."""
    return atomic_files.is_locked(folder / LAUNCHER) or atomic_files.is_locked(folder / WORKER)


@contextmanager
def recorded(folder: Path, launcher: str, count: int, job: str = "") -> Iterator[None]:
    """Record the block as an attempt of the run: its start, and its end or its error.

    Args:
        folder: The run folder.
        launcher: Name of the launcher.
        count: Number of ranks.
        job: Number of the cluster job; empty if there is none.

    Raises UserError if another attempt is running or a tool works in the folder.
    """
    with hold(folder, LAUNCHER):
        # Hold this lock only to check that no tool has it. It is free again when rank 0 locks it for the job.
        with hold(folder, WORKER):
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
            except OSError as fault:  # usually a full disk; do not let it replace the error of the block
                print(f"dvae: {folder / FILE} cannot be written ({fold(fault)})", file=sys.stderr)
            raise
        write(folder, [*earlier, ended(begun, 0, "finished")])


def ended(attempt: Attempt, status: int, message: str) -> Attempt:
    return replace(attempt, ended=round(time.time(), 3), status=status, message=message)


def close(folder: Path, status: int, message: str) -> Attempt:
    """Return the last attempt, which has ended. If it did not record its end, record it with `status` and `message`.

    Raises MachineError if there is no attempt, and UserError if the attempt is still running.
    """
    with hold(folder, LAUNCHER):
        if not (found := read(folder)):
            raise MachineError(f"{folder}: no attempt is on record in {FILE}")
        *earlier, last = found
        if last.ended is None:
            last = ended(last, status, message)
            write(folder, [*earlier, last])
    return last
