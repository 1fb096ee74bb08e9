"""Looking after runs: what state each is in, from its folder alone. Imports nothing heavy, and writes nothing but what
`cancel` learns of an attempt that could not say itself how it ended."""

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
"""Seconds between two looks at a run that is followed."""
QUEUE_POLL_SECONDS = 5.0
"""Seconds between two questions to SLURM about one that waits."""
LONGEST_ESTIMATE = 1e9
"""Seconds, some 30 years: a training that would take longer is not estimated."""
CANCEL_TIMEOUT = 120.0
"""Seconds that `cancel` waits for a run to save and end."""


class RunState(Enum):
    """What a run does."""

    running = "running"
    finished = "finished"
    """All stages of its config are done."""
    stopped = "stopped"
    """Asked to stop (a signal, max_hours); the same command again resumes it."""
    failed = "failed"
    """Ended by an error, or killed."""
    waiting = "waiting"
    """Submitted; nothing has begun yet."""


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """What there is to know of a run."""

    path: Path
    state: RunState
    message: str
    """Who runs it, or its last words."""
    stage: str = ""
    """The stage that it is in, or goes on with; empty where all are done."""
    step: int = 0
    """Steps of that stage on record."""
    total: int = 0
    """Steps of that stage; 0 where it has none."""
    images_per_second: float | None = None
    eta: float | None = None
    """Seconds that the rest of this stage will take; None where it does not run, or that is not known."""
    age: float | None = None
    """Seconds since the last row of metrics."""


def find_runs(folder: Path) -> list[Path]:
    """Run folders in or below `folder`, in the order of their names; what lies inside a run is none."""
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
    """The status of a run; `jobs` are what a cluster knows of its jobs, asked for here where not given.

    Raises UserError where the folder is none, MachineError where a file of it is damaged.
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
    """What the rest of a training takes at the speed of a row; None if the row's speed says nothing."""
    speed = row["images_per_second"]
    left = max(0, training["steps"] - row["step"]) * training["batch"]
    return left / speed if speed and 0 <= left / speed < LONGEST_ESTIMATE else None


@dataclass
class _TrainingFields:
    """What is read of the settings of a training."""

    steps: int
    batch: int


@dataclass
class _RunFields:
    """What is read of a run's config.yaml here; to check all of it would take seconds of imports."""

    run: str
    stages: list[str]


def _config(folder: Path) -> dict[str, Any]:
    """config.yaml as it is written, with the types that are used here."""
    check_format(folder)
    path = folder / "config.yaml"
    plain = read_yaml(path)
    check(_RunFields, plain, path)
    for name, value in plain.items():
        if name.startswith(TRAINING_PREFIX):
            check(_TrainingFields, value, f"{path}: {name}")
    return plain


def _training(config: dict[str, Any], stage: str, folder: Path) -> dict[str, Any]:
    """The settings by which a stage is trained. Raises DamagedFile for a stage that config.yaml does not know."""
    training: dict[str, Any] | None = config.get(training_field(stage))
    if training is None:
        raise DamagedFile(folder / "config.yaml", f"has no settings for the stage {stage[:40]!r} of metrics.jsonl")
    return training


def _state(folder: Path, tried: list[Attempt], live: bool, complete: bool, rows: bool) -> tuple[RunState, str]:
    """State and message of a run whose stages are `complete` or not, and which has rows of metrics or none."""
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
        return RunState.failed, f"killed without a word, pid {last.pid} on {last.host}, or the machine went down"
    if last.status == 0:
        return (RunState.finished, "") if complete else (RunState.waiting, f"{last.message}; stages were added since")
    stopped = last.status == attempts.INTERRUPTED or last.status == attempts.TERMINATED
    return RunState.stopped if stopped else RunState.failed, last.message


def _state_of_jobs(jobs: list[SlurmJob], state: RunState, message: str) -> tuple[RunState, str]:
    """State and message of a run with jobs on a cluster, of which the locks may tell nothing here."""
    busy = [job for job in jobs if job.state != "PENDING"]
    if busy:
        return RunState.running, f"job {busy[0].id} is {busy[0].state.lower()}" + (
            f", {message}" if state is RunState.running and message else ""
        )
    more = f", {len(jobs) - 1} more after it" if len(jobs) > 1 else ""
    last = f"; last attempt: {message}" if message and state is not RunState.waiting else ""
    return RunState.waiting, f"job {jobs[0].id} waits ({jobs[0].reason}){more}{last}"


def _lost_jobs(folder: Path, jobs: list[SlurmJob], tried: list[Attempt]) -> str:
    """What became of jobs after which no attempt began: of an array that builds shards, say; empty: one did."""
    submitted = queue.submitted_jobs(folder)
    if not submitted or (tried and tried[-1].started > submitted[-1].submitted):
        return ""
    bad = next((job for job in jobs if job.state != "COMPLETED"), None)
    how = f"job {bad.id} ended as {bad.state}" if bad else f"job {submitted[-1].id} has gone"
    return f"{how}, and no attempt began after it; see {folder / queue.FOLDER}"


def refuse_busy(folder: Path) -> None:
    """Raise UserError where somebody works in the folder, or a job for it waits on a cluster."""
    if attempts.in_use(folder):
        raise attempts.refusal(folder)
    if jobs := queue.active_jobs(folder):
        raise UserError(
            f"run={folder} has a job already, {jobs[0].id}, {jobs[0].state.lower()}: python tools/runs.py follow or "
            "cancel does that, or use another run="
        )


def _format_time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def metrics(folder: Path) -> MetricsLog:
    return MetricsLog(folder / "metrics.jsonl")


HEADINGS = ("run", "state", "stage", "step", "images/s", "left", "last row", "message")


def run_table(folder: Path) -> Iterator[str]:
    """Lines that list all runs below `folder`."""
    found = find_runs(folder)
    if not found:
        yield f"{folder}: no runs"
        return
    readable = []
    for path in found:
        with suppress(MachineError):  # its row says what is damaged
            queue.submitted_jobs(path)
            readable.append(path)
    jobs = queue.jobs_by_run(readable)
    yield from aligned_lines([HEADINGS, *(table_cells(path, jobs.get(path, [])) for path in found)])


def table_cells(folder: Path, jobs: list[SlurmJob]) -> tuple[str, ...]:
    """A run's row of the table, without control characters; one that cannot be read says why."""
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
    """A line for the newest row of metrics and for every one to come, until the run ends; then how it ended.

    Raises MachineError where it failed.
    """
    seen, waits = _time(metrics(folder).newest() or {}) - 1e-6, ""
    while True:
        here = attempts.in_use(folder)  # before the rows are read, so that none is missed
        jobs = [] if here else queue.active_jobs(folder)
        config = _config(folder)
        for row in metrics(folder).tail():
            if _time(row) > seen:  # rows of steps that are taken again are newer too
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
    """When a row was written; 0 if it does not say."""
    return row.get("time") or 0.0


def progress_line(row: dict[str, Any], config: dict[str, Any], folder: Path) -> str:
    """A row of metrics as progress shows it: "refiner: 1200/5000  182 images/s  loss 0.0123  2:13 left"."""
    if row.get("images_per_second") is None:
        return f"{row['stage']}: " + "  ".join(f"{key} {value}" for key, value in row.items() if key != "stage")
    training, speed = _training(config, row["stage"], folder), row["images_per_second"]
    parts = [f"{row['stage']}: {row['step']}/{training['steps']}", f"{speed:.4g} images/s"]
    parts += [f"loss {row['loss']:.4g}"] if row.get("loss") is not None else []
    left = _seconds_left(training, row)
    parts += [] if left is None else [f"{clock(left)} left"]
    return "  ".join(parts)


def cancel(folder: Path) -> Iterator[str]:
    """Ask the attempt that goes on to save and end, wait for that, and say what happened."""
    if jobs := queue.active_jobs(folder):
        yield from _cancel_jobs(folder, jobs)
        return
    status = run_status(folder, [])
    if status.state is not RunState.running:
        raise UserError(f"run={folder} is {status.state.value}: there is nothing to cancel")
    tried = attempts.read(folder)
    if not atomic_files.is_locked(folder / attempts.LAUNCHER) or not tried or tried[-1].ended is not None:
        raise UserError(f"run={folder} is held by no attempt ({status.message}): end that where it was started")
    last = tried[-1]
    if last.host != socket.gethostname():
        raise UserError(f"run={folder} goes on at {last.host} (pid {last.pid}): cancel it there")
    try:
        if not _has_open(last.pid, folder / attempts.LAUNCHER):
            raise UserError(f"run={folder}: pid {last.pid} is another process here: cancel it where it was started")
        os.kill(last.pid, signal.SIGTERM)
    except PermissionError:
        raise UserError(f"run={folder}: pid {last.pid} belongs to another user: ask them to cancel it") from None
    except (ProcessLookupError, FileNotFoundError):
        pass  # it has just ended; how, is said below
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
    """As `cancel`, of a run on a cluster: what waits is canceled, what runs saves and ends."""
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
    """Whether that process has the lock file open; a number may have passed on to another process, or another
    container's be meant. True where the system does not tell."""
    opened = Path(f"/proc/{pid}/fd")
    if not Path("/proc/self/fd").is_dir():
        return True
    return any(handle.exists() and os.path.samefile(handle, lock) for handle in opened.iterdir())


def _is_same_path(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same place; a link that leads to itself leads nowhere."""
    return os.path.realpath(one) == os.path.realpath(other)


def enter_start_folder(folder: Path) -> None:
    """Go where the run was started, so that the relative paths of its config hold. Raises UserError where it cannot be
    resumed from its folder alone."""
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
