"""What SLURM says of jobs and is told, through squeue, scontrol and scancel; and which jobs a run has. Imports nothing
heavy."""

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
"""In the run folder: jobs.json, and a folder by job with its sbatch file and logs."""
FILE = "jobs.json"
FINISHED_STATES = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip
"""States of a job that neither waits nor runs."""
ANSWER_TIMEOUT = 60
"""Seconds that SLURM may take for an answer."""


@dataclass(frozen=True, kw_only=True)
class SubmittedJob:
    """A job of a run, as jobs.json holds it."""

    id: Annotated[str, Field(pattern="^[0-9]{1,20}$")]
    """Its number; that of the whole array if it is one."""
    stages: list[str]
    """What it does."""
    submitted: Seconds
    """Seconds since 1970."""


@dataclass(frozen=True, kw_only=True)
class SlurmJob:
    """A job, or a task of an array, as squeue shows it."""

    id: str
    state: str
    """PENDING, RUNNING, COMPLETED, ..."""
    reason: str
    """Why it waits."""

    @property
    def active(self) -> bool:
        """Whether it waits or runs."""
        return self.state not in FINISHED_STATES

    @property
    def number(self) -> str:
        """Its number; of a task of an array, the array's."""
        return self.id.partition("_")[0]

    @property
    def task(self) -> str:
        """What part of an array it is; empty where it is none."""
        return self.id.partition("_")[2]


def submitted_jobs(folder: Path) -> list[SubmittedJob]:
    """All jobs that a run was given, in their order. Raises MachineError where the file is damaged."""
    path = folder / FOLDER / FILE
    if not path.exists():
        return []
    try:
        return read_json(path, list[SubmittedJob])
    except DamagedFile as error:
        raise MachineError(f"{path}: is damaged ({error.reason}); delete it to go on, the run is safe") from None


def record_jobs(folder: Path, jobs: Iterable[SubmittedJob]) -> None:
    """Add jobs to those of a run."""
    atomic_files.write_json(folder / FOLDER / FILE, [asdict(job) for job in [*submitted_jobs(folder), *jobs]])


def is_available() -> bool:
    """Whether this machine can talk to a SLURM."""
    return shutil.which("squeue") is not None


def run_slurm_command(*words: str) -> str:
    """What a command of SLURM prints. Raises MachineError where it fails or does not answer."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=ANSWER_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(f"{words[0]}: no answer from SLURM ({fold(error)}): try again") from None
    if done.returncode:
        raise MachineError(f"{' '.join(words[:3])}: {fold(done.stderr) or f'exit status {done.returncode}'}")
    return done.stdout


def query_jobs(ids: Iterable[str]) -> dict[str, list[SlurmJob]]:
    """The tasks of each job that SLURM still remembers, by the job's number."""
    wanted = sorted(set(ids))
    if not wanted:
        return {}
    try:
        text = run_slurm_command(
            "squeue", "--noheader", "--states=all", f"--jobs={','.join(wanted)}", "--format=%i|%T|%r"
        )
    except MachineError as error:
        if "Invalid job id" in str(error):  # it has forgotten the only one that was asked for
            return {}
        raise
    found: dict[str, list[SlurmJob]] = {}
    for line in text.splitlines():
        number, state, reason = line.split("|", 2)
        job = SlurmJob(id=number, state=state, reason=reason)
        found.setdefault(job.number, []).append(job)
    return found


def jobs_by_run(folders: Iterable[Path]) -> dict[Path, list[SlurmJob]]:
    """What SLURM knows of the jobs of each run, asked once for all; nothing where this machine cannot ask."""
    numbers = {folder: [job.id for job in submitted_jobs(folder)] for folder in folders}
    found = query_jobs(number for mine in numbers.values() for number in mine) if is_available() else {}
    return {folder: [job for number in mine for job in found.get(number, [])] for folder, mine in numbers.items()}


def active_jobs(folder: Path) -> list[SlurmJob]:
    """The run's jobs that wait or run; none where this machine cannot ask."""
    return [job for job in jobs_by_run([folder])[folder] if job.active]


def end_time(job: str) -> float | None:
    """When the time limit of a running job is over, in seconds since 1970; None where it has none."""
    text = run_slurm_command("squeue", "--noheader", f"--jobs={job}", "--format=%e").strip()
    return datetime.fromisoformat(text).timestamp() if text[:1].isdigit() else None


def is_preempted(job: str) -> bool:
    """Whether a running job has to make room for another."""
    text = run_slurm_command("scontrol", "show", "job", "--oneliner", job)
    return "PreemptTime=" in text and "PreemptTime=None" not in text


def requeue_job(job: str) -> None:
    """Put this job back into the queue, which ends what it runs; does not return where that works."""
    run_slurm_command("scontrol", "requeue", job)
    time.sleep(ANSWER_TIMEOUT)
    raise MachineError(f"SLURM has not requeued job {job}: the same command again resumes")


def cancel_job(job: str, signal: str = "") -> None:
    """Cancel a job or a step ("12.0"), or send a signal to its ranks."""
    run_slurm_command("scancel", *([f"--signal={signal}"] if signal else []), job)


def terminate(job: str) -> None:
    """Ask a job that runs to save and end: its ranks, and its supervisor, which may be waiting to start them."""
    run_slurm_command("scancel", "--signal=TERM", "--batch", job)
    run_slurm_command("scancel", "--signal=TERM", job)
