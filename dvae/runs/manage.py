"""List, follow and cancel runs. Their states are read from their folders alone. Imports no large packages.

Nothing is written, except by `cancel`: it records the end of an attempt that could not record it itself.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from dvae.config.stage_names import TRAINING_PREFIX, stage_of, training_field
from dvae.errors import MachineError, UserError, printable_line
from dvae.runs import attempts
from dvae.runs.attempts import Attempt
from dvae.runs.records import check_format, read_records
from dvae.runs.slurm import queue
from dvae.runs.slurm.queue import SlurmJob
from dvae.tracking.console import clock
from dvae.tracking.metrics_log import MetricsLog
from dvae.utils import atomic_files
from dvae.utils.read import DamagedFile, check, read_yaml
from dvae.utils.text_tables import aligned_lines

POLL_SECONDS = 1.0
"""Seconds between two checks of a running run that is followed."""
QUEUE_POLL_SECONDS = 5.0
"""Seconds between two queries to SLURM about a waiting run that is followed."""
LONGEST_ESTIMATE = 1e9
"""Longest remaining time that is shown, in seconds (about 30 years)."""
CANCEL_TIMEOUT = 120.0
"""Seconds that `cancel` waits for a run to save and end."""


class RunState(Enum):
    """The state of a run."""

    running = "running"
    finished = "finished"
    """All stages of the config are finished."""
    stopped = "stopped"
    """The run was asked to stop, by a signal or max_hours. The same command resumes it."""
    failed = "failed"
    """The run ended with an error, or was killed."""
    waiting = "waiting"
    """The run was submitted but has not started, or it is finished but stages were added to its config."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """The status of a run."""

    path: Path
    state: RunState
    message: str
    """The process that runs it, or the reason why it ended."""
    stage: str = ""
    """The current stage, or the stage with which the run continues. Empty if all stages are finished."""
    step: int = 0
    """Step of the stage in the last row of metrics."""
    total: int = 0
    """Total number of steps of the stage. 0 if the stage has no steps."""
    images_per_second: float | None = None
    eta: float | None = None
    """Estimated seconds until the end of the stage. None if the run is not running, or if the time is unknown."""
    age: float | None = None
    """Seconds since the last row of metrics. None if there is no row, or if it has no time."""


def find_runs(folder: Path) -> list[Path]:
    """Return the run folders in or below `folder`, sorted. Folders inside a run folder are not searched."""
    if not folder.is_dir():
        raise UserError(f"in={folder}: no such folder: give the one that holds your runs")
    found = []
    for here, folders, names in os.walk(folder):
        if "config.yaml" in names and "bundle.json" not in names:
            found.append(Path(here))
            folders.clear()
        folders[:] = [name for name in folders if name != "wandb" and not name.startswith(".")]
    return sorted(found)


def run_status(folder: Path, jobs: list[SlurmJob] | None = None) -> RunStatus:
    """Return the status of a run. `jobs` are its jobs on SLURM; if they are None, SLURM is queried.

    Raises UserError if `folder` is not a run folder, and MachineError if a file in it is damaged.
    """
    config, records = _config(folder), read_records(folder)
    tried = attempts.read(folder)
    live = attempts.in_use(folder)
    row = metrics(folder).newest()
    state, message = _state(folder, tried, live, all(stage in records for stage in config["stages"]), row is not None)
    jobs = queue.jobs_by_run([folder]).get(folder, []) if jobs is None else jobs
    if active := [job for job in jobs if job.active]:
        state, message = _state_of_jobs(active, state, message)
    elif state is not RunState.finished and not live and (gone := _lost_jobs(folder, jobs, tried)):
        state, message = RunState.failed, gone
    left = [stage for stage in config["stages"] if stage not in records]
    age = time.time() - row["time"] if row and row.get("time") is not None else None
    if not left:
        return RunStatus(path=folder, state=state, message=message, age=age)
    if row is None or stage_of(row["stage"]) not in left or row.get("images_per_second") is None:
        total = config.get(training_field(left[0]), {}).get("steps", 0)
        return RunStatus(path=folder, state=state, message=message, stage=left[0], total=total, age=age)
    training = _training(config, row["stage"], folder)
    speed = row["images_per_second"]
    running = state is RunState.running
    return RunStatus(
        path=folder,
        state=state,
        message=message,
        stage=row["stage"],
        step=row["step"],
        total=training["steps"],
        images_per_second=speed if running else None,
        eta=_seconds_left(training, row) if running else None,
        age=age,
    )


def _seconds_left(training: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Return the seconds until the end of a training, at the speed in a row of metrics. None if it is not usable."""
    speed = row["images_per_second"]
    left = max(0, training["steps"] - row["step"]) * training["batch"]
    return left / speed if speed and 0 <= left / speed < LONGEST_ESTIMATE else None


@dataclass
class _TrainingFields:
    """The fields that are read from the settings of a training."""

    steps: int
    batch: int


@dataclass
class _RunFields:
    """The fields that are read from config.yaml. Checking all fields would need imports that take seconds."""

    run: str
    stages: list[str]


def _config(folder: Path) -> dict[str, Any]:
    """Return the values in config.yaml. Only the types of the fields that this module uses are checked."""
    check_format(folder)
    path = folder / "config.yaml"
    plain = read_yaml(path)
    check(_RunFields, plain, path)
    for name, value in plain.items():
        if name.startswith(TRAINING_PREFIX):
            check(_TrainingFields, value, f"{path}: {name}")
    return plain


def _training(config: dict[str, Any], stage: str, folder: Path) -> dict[str, Any]:
    """Return the training settings of a stage. Raises DamagedFile if config.yaml has no settings for the stage."""
    training: dict[str, Any] | None = config.get(training_field(stage))
    if training is None:
        raise DamagedFile(folder / "config.yaml", f"has no settings for the stage {stage[:40]!r} of metrics.jsonl")
    return training


def _state(folder: Path, tried: list[Attempt], live: bool, complete: bool, rows: bool) -> tuple[RunState, str]:
    """Return state and message of a run from its attempts. `live`: its folder is in use; `rows`: it has metrics."""
    last = tried[-1] if tried else None
    if live:
        if last is None or last.ended is not None:
            return RunState.running, "a tool works in the folder, or the run is about to start"
        ranks = f", {last.count} ranks" if last.count > 1 else ""
        return (
            RunState.running,
            f"since {_format_time(last.started)}, pid {last.pid} on {last.host} ({last.launcher}{ranks})",
        )
    if last is None:
        state = RunState.finished if complete else RunState.stopped if rows else RunState.waiting
        return state, "" if complete else "no attempt is on record"
    if last.ended is None:
        return RunState.failed, f"killed, pid {last.pid} on {last.host}, or the machine went down"
    if last.status == 0:
        return (RunState.finished, "") if complete else (RunState.waiting, f"{last.message}; stages were added since")
    stopped = last.status == attempts.INTERRUPTED or last.status == attempts.TERMINATED
    return RunState.stopped if stopped else RunState.failed, last.message


def _state_of_jobs(jobs: list[SlurmJob], state: RunState, message: str) -> tuple[RunState, str]:
    """Return state and message of a run with active SLURM jobs. Locks of other machines may be invisible here."""
    busy = [job for job in jobs if job.state != "PENDING"]
    if busy:
        return RunState.running, f"job {busy[0].id} is {busy[0].state.lower()}" + (
            f", {message}" if state is RunState.running and message else ""
        )
    more = f", {len(jobs) - 1} more after it" if len(jobs) > 1 else ""
    last = f"; last attempt: {message}" if message and state is not RunState.waiting else ""
    return RunState.waiting, f"job {jobs[0].id} waits ({jobs[0].reason}){more}{last}"


def _lost_jobs(folder: Path, jobs: list[SlurmJob], tried: list[Attempt]) -> str:
    """Return a message about the last jobs if they ended without an attempt, such as a failed array. Otherwise ""."""
    submitted = queue.submitted_jobs(folder)
    if not submitted or (tried and tried[-1].started > submitted[-1].submitted):
        return ""
    bad = next((job for job in jobs if job.state != "COMPLETED"), None)
    how = f"job {bad.id} ended as {bad.state}" if bad else f"job {submitted[-1].id} is gone"
    return f"{how}, and no attempt started after it; see {folder / queue.FOLDER}"


def refuse_busy(folder: Path) -> None:
    """Raise UserError if a process works in the folder, or if the run has an active job on SLURM."""
    if attempts.in_use(folder):
        raise attempts.refusal(folder)
    if jobs := queue.active_jobs(folder):
        raise UserError(
            f"run={folder} has a job already, {jobs[0].id}, {jobs[0].state.lower()}: follow or cancel it with "
            "python tools/runs.py, or use another run="
        )


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def metrics(folder: Path) -> MetricsLog:
    return MetricsLog(folder / "metrics.jsonl")


HEADINGS = ("run", "state", "stage", "step", "images/s", "left", "last row", "message")


def run_table(folder: Path) -> Iterator[str]:
    """Yield the lines of a table of all runs below `folder`."""
    found = find_runs(folder)
    if not found:
        yield f"{folder}: no runs"
        return
    readable = []
    for path in found:
        with suppress(MachineError):  # `table_cells` reports the damaged file in the run's row
            queue.submitted_jobs(path)
            readable.append(path)
    jobs = queue.jobs_by_run(readable)
    yield from aligned_lines([HEADINGS, *(table_cells(path, jobs.get(path, [])) for path in found)])


def table_cells(folder: Path, jobs: list[SlurmJob]) -> tuple[str, ...]:
    """Return a run's row of the table, without control characters. If the run cannot be read, it gives the reason."""
    try:
        status = run_status(folder, jobs)
    except (UserError, MachineError, OSError) as error:
        return (printable_line(folder), "damaged", "", "", "", "", "", printable_line(error))
    row = (
        str(folder),
        status.state.value,
        status.stage,
        f"{status.step}/{status.total}" if status.total else "",
        f"{status.images_per_second:.4g}" if status.images_per_second is not None else "",
        clock(status.eta) if status.eta is not None else "",
        f"{clock(status.age)} ago" if status.age is not None else "",
        status.message,
    )
    return tuple(map(printable_line, row))


def follow(folder: Path) -> Iterator[str]:
    """Yield a line for the newest row of metrics and for every later row until the run ends, then its final state.

    Raises MachineError if the run failed.
    """
    seen, waits = _time(metrics(folder).newest() or {}) - 1e-6, ""
    while True:
        here = attempts.in_use(folder)  # check this before reading rows: the last rows must not be missed
        jobs = [] if here else queue.active_jobs(folder)
        config = _config(folder)
        for row in metrics(folder).tail():
            if _time(row) > seen:  # compare times, not steps: a resumed run repeats steps
                seen = _time(row)
                yield progress_line(row, config, folder)
        if not here and not jobs:
            break
        if jobs and (status := run_status(folder, jobs)).message != waits:
            waits = status.message
            yield f"{folder} is {status.state.value}: {waits}"
        time.sleep(POLL_SECONDS if here else QUEUE_POLL_SECONDS)
    status = run_status(folder)
    if status.state is RunState.failed:
        raise MachineError(f"{folder} failed: {status.message}")
    yield f"{folder} is {status.state.value}" + (f": {status.message}" if status.message else "")


def _time(row: dict[str, Any]) -> float:
    """Return the time at which a row was written, or 0 if the row has no time."""
    return row.get("time") or 0.0


def progress_line(row: dict[str, Any], config: dict[str, Any], folder: Path) -> str:
    """Format a row of metrics as progress: "refiner: 1200/5000  182 images/s  loss 0.0123  2:13 left"."""
    if row.get("images_per_second") is None:
        return f"{row['stage']}: " + "  ".join(f"{key} {value}" for key, value in row.items() if key != "stage")
    training, speed = _training(config, row["stage"], folder), row["images_per_second"]
    parts = [f"{row['stage']}: {row['step']}/{training['steps']}", f"{speed:.4g} images/s"]
    parts += [f"loss {row['loss']:.4g}"] if row.get("loss") is not None else []
    left = _seconds_left(training, row)
    parts += [] if left is None else [f"{clock(left)} left"]
    return "  ".join(parts)


def cancel(folder: Path) -> Iterator[str]:
    """Ask the running attempt to save and end, and wait until it does. Yields lines that report what happens."""
    if jobs := queue.active_jobs(folder):
        yield from _cancel_jobs(folder, jobs)
        return
    status = run_status(folder, [])
    if status.state is not RunState.running:
        raise UserError(f"run={folder} is {status.state.value}: there is nothing to cancel")
    tried = attempts.read(folder)
    if not atomic_files.is_locked(folder / attempts.LAUNCHER) or not tried or tried[-1].ended is not None:
        raise UserError(f"run={folder} has no running attempt ({status.message}): end the tool where it was started")
    last = tried[-1]
    if last.host != socket.gethostname():
        raise UserError(f"run={folder} runs on {last.host} (pid {last.pid}): cancel it there")
    try:
        if not _has_open(last.pid, folder / attempts.LAUNCHER):
            raise UserError(f"run={folder}: pid {last.pid} is another process here: cancel it where it was started")
        os.kill(last.pid, signal.SIGTERM)
    except PermissionError:
        raise UserError(f"run={folder}: pid {last.pid} belongs to another user: ask them to cancel it") from None
    except (ProcessLookupError, FileNotFoundError):
        pass  # it has just ended; the last line below reports how
    yield f"{folder}: SIGTERM to pid {last.pid} ({last.launcher}); waiting for it to save and end"
    deadline = time.monotonic() + CANCEL_TIMEOUT
    while atomic_files.is_locked(folder / attempts.LAUNCHER):
        if time.monotonic() >= deadline:
            yield f"{folder}: still at work after {CANCEL_TIMEOUT:g} s; cancel it again to end it without saving"
            return
        time.sleep(0.1)
    said = "ended by SIGTERM outside training: finished stages and checkpoints are kept"
    yield f"{folder}: {attempts.close(folder, attempts.TERMINATED, said).message}"


def _cancel_jobs(folder: Path, jobs: list[SlurmJob]) -> Iterator[str]:
    """Cancel a run on SLURM. Waiting jobs and arrays are canceled; running jobs are asked to save and end."""
    busy = [job for job in jobs if job.state == "RUNNING" and not job.task]
    for number in dict.fromkeys(job.number for job in jobs if job.state == "PENDING" or job.task):
        queue.cancel_job(number)
        yield f"{folder}: job {number} is canceled"
    for job in busy:
        queue.terminate(job.id)
        yield f"{folder}: SIGTERM to the ranks of job {job.id}; waiting for it to save and end"
    deadline = time.monotonic() + CANCEL_TIMEOUT
    while busy and queue.active_jobs(folder):
        if time.monotonic() >= deadline:
            yield f"{folder}: still at work after {CANCEL_TIMEOUT:g} s; cancel it again to end it without saving"
            return
        time.sleep(POLL_SECONDS)
    if busy:
        yield f"{folder}: {attempts.close(folder, attempts.TERMINATED, 'ended by SIGTERM').message}"


def _has_open(pid: int, lock: Path) -> bool:
    """Return whether process `pid` has the lock file open. Always True on systems without /proc.

    If False, the ID belongs to another process by now, or to a process in another container.
    """
    opened = Path(f"/proc/{pid}/fd")
    if not Path("/proc/self/fd").is_dir():
        return True
    return any(handle.exists() and os.path.samefile(handle, lock) for handle in opened.iterdir())


def _is_same_path(one: Path, other: Path) -> bool:
    """Return whether two paths lead to the same place. realpath also accepts a link that leads to itself."""
    return os.path.realpath(one) == os.path.realpath(other)


def enter_start_folder(folder: Path) -> None:
    """Change to the directory in which the run was started, because its config may have relative paths.

    Raises UserError if the run cannot be resumed from its folder alone.
    """
    status = run_status(folder)
    if status.state is RunState.running:
        raise UserError(f"run={folder} is running already ({status.message})")
    tried = attempts.read(folder)
    last = tried[-1] if tried else None
    if last and last.launcher == "torchrun":
        raise UserError(f"run={folder} was started by torchrun on {last.count} ranks: give that command again")
    made, cwd = str(_config(folder).get("run")), last.cwd if last else os.getcwd()
    if not os.path.isdir(cwd) or not made.isprintable() or not _is_same_path(Path(cwd, made), folder):
        raise UserError(
            f"run={folder} was made as run={made} in {cwd}, which is another folder now: give the launch command again"
        )
    os.chdir(cwd)
