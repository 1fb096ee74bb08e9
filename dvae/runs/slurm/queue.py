"""Query and control SLURM jobs through squeue, scontrol and scancel, and record the jobs of a run.

This module imports no large packages.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated

from pydantic import Field

from dvae.errors import MachineError, fold
from dvae.utils import atomic_files
from dvae.utils.number_types import Seconds
from dvae.utils.read import DamagedFile, read_json

FOLDER = "slurm"
"""Folder in the run folder with jobs.json, and with a folder for each job that holds its sbatch file and logs."""
FILE = "jobs.json"
FINISHED_STATES = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip
"""States of jobs that have ended. In all other states, a job waits or runs."""
ANSWER_TIMEOUT = 60
"""Seconds within which a command of SLURM must answer."""


@dataclass(frozen=True, kw_only=True)
class SubmittedJob:
    """A submitted job of a run: an entry of jobs.json."""

    id: Annotated[str, Field(pattern="^[0-9]{1,20}$")]
    """Number of the job, or of the job array."""
    stages: list[str]
    """The stages that the job runs."""
    submitted: Seconds
    """Time of the submission, in seconds since 1970."""


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """A job, or a task of a job array, in the output of squeue."""

    id: str
    """Number of the job, or ARRAY_TASK for a task of a job array."""
    state: str
    """State of the job: PENDING, RUNNING, COMPLETED, ..."""
    reason: str
    """Reason why the job waits."""

    @property
    def active(self) -> bool:
        """Whether the job waits or runs."""
        return self.state not in FINISHED_STATES

    @property
    def number(self) -> str:
        """Number of the job, or of the job array that contains it."""
        return self.id.partition("_")[0]

    @property
    def task(self) -> str:
        """Task numbers in the job array. Empty if the job is not part of an array."""
        return self.id.partition("_")[2]


def submitted_jobs(folder: Path) -> list[SubmittedJob]:
    """Return all submitted jobs of a run, in their order. Raises MachineError if jobs.json is damaged."""
    path = folder / FOLDER / FILE
    if not path.exists():
        return []
    try:
        return read_json(path, list[SubmittedJob])
    except DamagedFile as error:
        raise MachineError(f"{path}: is damaged ({error.reason}); delete it to go on, the run is safe") from None


def record_jobs(folder: Path, jobs: Iterable[SubmittedJob]) -> None:
    """Add jobs to jobs.json of a run."""
    atomic_files.write_json(folder / FOLDER / FILE, [asdict(job) for job in [*submitted_jobs(folder), *jobs]])


def is_available() -> bool:
    """Return whether this machine has the commands of SLURM."""
    return shutil.which("squeue") is not None


def run_slurm_command(*words: str) -> str:
    """Run a command of SLURM, and return its output. Raises MachineError if it fails or does not answer in time."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=ANSWER_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(f"{words[0]}: no answer from SLURM ({fold(error)}): try again") from None
    if done.returncode:
        raise MachineError(f"{' '.join(words[:3])}: {fold(done.stderr) or f'exit status {done.returncode}'}")
    return done.stdout


def query_jobs(ids: Iterable[str]) -> dict[str, list[SlurmJob]]:
    """Query the jobs `ids`. Returns the tasks of each job that SLURM still knows, by the number of the job.

    A job that is not an array has one entry. Raises MachineError if SLURM does not answer.
    """
    wanted = sorted(set(ids))
    if not wanted:
        return {}
    try:
        text = run_slurm_command(
            "squeue", "--noheader", "--states=all", f"--jobs={','.join(wanted)}", "--format=%i|%T|%r"
        )
    except MachineError as error:
        # squeue reports this error if it is asked for a single job, and no longer knows it.
        if "Invalid job id" in str(error):
            return {}
        raise
    found: dict[str, list[SlurmJob]] = {}
    for line in text.splitlines():
        number, state, reason = line.split("|", 2)
        job = SlurmJob(id=number, state=state, reason=reason)
        found.setdefault(job.number, []).append(job)
    return found


def jobs_by_run(folders: Iterable[Path]) -> dict[Path, list[SlurmJob]]:
    """Return the jobs of each run that SLURM still knows, with a single query. Empty lists without SLURM."""
    numbers = {folder: [job.id for job in submitted_jobs(folder)] for folder in folders}
    found = query_jobs(number for mine in numbers.values() for number in mine) if is_available() else {}
    return {folder: [job for number in mine for job in found.get(number, [])] for folder, mine in numbers.items()}


def active_jobs(folder: Path) -> list[SlurmJob]:
    """Return the run's jobs that wait or run. Empty if SLURM is not available."""
    return [job for job in jobs_by_run([folder])[folder] if job.active]


def end_time(job: str) -> float | None:
    """Return the time at which a running job reaches its time limit, in seconds since 1970. None if it has no limit."""
    text = run_slurm_command("squeue", "--noheader", f"--jobs={job}", "--format=%e").strip()
    return datetime.fromisoformat(text).timestamp() if text[:1].isdigit() else None


def is_preempted(job: str) -> bool:
    """Return whether SLURM preempts the running job in favor of another job."""
    text = run_slurm_command("scontrol", "show", "job", "--oneliner", job)
    return "PreemptTime=" in text and "PreemptTime=None" not in text


def requeue_job(job: str) -> None:
    """Requeue the job to which this process belongs. SLURM then ends this process.

    Raises MachineError if SLURM does not requeue the job.
    """
    run_slurm_command("scontrol", "requeue", job)
    time.sleep(ANSWER_TIMEOUT)
    raise MachineError(f"SLURM has not requeued job {job}: the same command again resumes")


def cancel_job(job: str, signal: str = "") -> None:
    """Cancel a job or a job step ("12.0"). If `signal` is given, only send this signal to its ranks."""
    run_slurm_command("scancel", *([f"--signal={signal}"] if signal else []), job)


def terminate(job: str) -> None:
    """Ask a running job to save and end, by SIGTERM to its supervisor and to its ranks.

    The supervisor needs the signal too, because it may be pausing before it starts the ranks again.
    """
    run_slurm_command("scancel", "--signal=TERM", "--batch", job)
    run_slurm_command("scancel", "--signal=TERM", job)
