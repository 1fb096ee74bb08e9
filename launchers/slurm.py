"""Run the job on SLURM, submitted through submitit: this returns, or follows the run, while the job waits and runs."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from dvae.errors import Stopped, UserError, fold
from dvae.registry.launchers.base import LAUNCHERS, Launcher, LauncherConfig
from dvae.registry.stages.base import STAGES
from dvae.runs.slurm import queue
from dvae.runs.slurm.queue import SubmittedJob
from dvae.utils.child_processes import handling

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
CONF = "SLURM_CONF"


@LAUNCHERS.register("slurm")
class Slurm(Launcher):
    """As a job on SLURM, one rank per GPU; the job comes back by itself until the run is finished."""

    elsewhere = True

    @dataclass(kw_only=True, slots=True)
    class Config(LauncherConfig):
        partition: str = ""
        """Partition ("": the cluster's default)."""
        account: str = ""
        """Account that is charged."""
        qos: str = ""
        """Quality of service."""
        nodes: int = 1
        """Nodes."""
        gpus_per_node: int = 0
        """GPUs on each node, one rank for each."""
        tasks_per_node: int = 0
        """Ranks on each node (0: one per GPU, or one)."""
        cpus_per_task: int = 4
        """CPUs of a rank: its own and those of its data workers."""
        mem: str = ""
        """Memory of a node, as "64G" ("": the cluster's default)."""
        time: str = "24:00:00"
        """Time limit of a job, as SLURM writes it: minutes, H:MM:SS, D-HH:MM:SS; the run itself may take longer."""
        constraint: str = ""
        """Features that the nodes must have."""
        reservation: str = ""
        """Reservation."""
        exclude: str = ""
        """Nodes to keep away from."""
        comment: str = ""
        """Comment."""
        setup: list[str] = field(default_factory=list)
        """Lines of shell before the ranks start: "module load cuda", "export NCCL_DEBUG=INFO"."""
        python: str = ""
        """Python of the ranks, in a container if you like: "apptainer exec --nv dvae.sif python" ("": the one here)."""
        srun: list[str] = field(default_factory=list)
        """More words for srun, as ["--container-image=dvae.sqsh"]."""
        sbatch: list[str] = field(default_factory=list)
        """More options of sbatch, as ["--mail-type=FAIL", "--exclusive"]."""
        signal_seconds: int = 120
        """How long before the time limit the ranks are told to save; SLURM may be up to a minute earlier."""
        start_seconds: int = 600
        """How long the first rank may take to begin; then the job goes back into the queue, to get other nodes."""
        max_attempts: int = 3
        """Attempts in a row that may end in a failure, or by a requeue, without having saved anything."""
        retry_seconds: float = 30.0
        """Pause before the ranks start anew after a failure; each time twice as long."""
        wait: bool | None = None
        """Follow the run here until it ends; Ctrl-C leaves it alone (null: on a terminal)."""
        chain: bool = False
        """A job for each part of the run, each waiting for the one before: shards and cache on cpu_partition, training,
        evaluation on one node."""
        cpu_partition: str = ""
        """With chain: partition of shards and cache ("": as the rest)."""
        array_jobs: int = 4
        """With chain: jobs of the array that builds shards together, and of that which writes the cache."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for name in ("nodes", "cpus_per_task", "max_attempts", "array_jobs", "signal_seconds", "start_seconds"):
            if getattr(config, name) < 1:
                raise UserError(f"launcher.{name}={getattr(config, name)}: use 1 or more")
        for name in ("gpus_per_node", "tasks_per_node", "retry_seconds"):
            if not getattr(config, name) >= 0:
                raise UserError(f"launcher.{name}={getattr(config, name)}: use 0 or more")
        self.minutes = time_limit_minutes(config.time)
        if 60 * self.minutes <= config.signal_seconds:
            raise UserError(
                f"launcher.time={config.time} leaves no time before launcher.signal_seconds={config.signal_seconds}: "
                "ask for more time"
            )

    @property
    def per_node(self) -> int:
        return self.config.tasks_per_node or self.config.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        return int(self.config.nodes) * self.per_node

    def launch(self, folder: Path) -> None:
        """Submit the run, and follow it where `wait` says so.

        Raises UserError where SLURM refuses it, MachineError where it failed.
        """
        from dvae.runs.folder import Run

        if not queue.is_available():
            raise UserError("launcher=slurm: there is no squeue here: run this where jobs are submitted")
        submitted = self.submit(folder, Run(folder).own_config().stages)
        queue.record_jobs(folder, submitted)
        for job in submitted:
            print(f"dvae: job {job.id}: {', '.join(job.stages)}", flush=True)
        if self.waits:
            follow(folder)
        else:
            print(f"dvae: next: python tools/runs.py follow run={folder}  (or list, cancel)", flush=True)

    @property
    def waits(self) -> bool:
        return sys.stdout.isatty() if self.config.wait is None else bool(self.config.wait)

    def can_attach(self, folder: Path) -> bool:
        return self.waits and bool(queue.active_jobs(folder))

    def attach(self, folder: Path) -> None:
        follow(folder)

    def submit(self, folder: Path, stages: list[str]) -> list[SubmittedJob]:
        """Submit a job, or a chain of jobs; what was submitted is canceled where a later one is refused."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        submitted: list[SubmittedJob] = []
        with (
            hidden_job_environment(),
            redirect_stderr(StringIO()),
        ):  # submitit shows what sbatch says; here that is one line
            try:
                for executor, work, count, doing in self.submissions(folder, stages, submitted):
                    made = executor.map_array(work, range(count)) if count > 1 else [executor.submit(work)]
                    number = str(made[0].job_id).partition("_")[0]
                    submitted.append(SubmittedJob(id=number, stages=list(doing), submitted=round(time.time(), 3)))
            except BaseException as error:
                for job in submitted:
                    queue.cancel_job(job.id)
                for left in [*(folder / queue.FOLDER).glob("*.pkl"), *(folder / queue.FOLDER).glob(".submission_*")]:
                    left.unlink()
                if isinstance(error, FailedJobError | FailedSubmissionError):
                    raise UserError(f"launcher=slurm: sbatch refused the job: {sbatch_error(error)}") from None
                raise
        return submitted

    def submissions(
        self, folder: Path, stages: list[str], submitted: list[SubmittedJob]
    ) -> Iterator[tuple[Any, Callable[..., None], int, tuple[str, ...]]]:
        """Executor, work, number of jobs (more than one make an array) and stages of each submission.

        Each waits for the last of `submitted`, which the caller adds to.
        """
        from dvae.runs.slurm.supervisor import Supervisor

        here = str(folder.absolute())
        for part in self.stages_by_job(stages):
            count = self.config.array_jobs
            if self.config.chain and STAGES.get(part[0]).in_parts and count > 1:
                yield self.executor(folder, part, submitted, array=True), ArrayTask(here, part[0], count), count, part
            yield self.executor(folder, part, submitted), Supervisor(here, part), 1, part

    def stages_by_job(self, stages: list[str]) -> list[tuple[str, ...]]:
        """The stages of each job, in their order; one job takes all of them unless `chain` is set."""
        ordered = STAGES.order(stages)
        if not self.config.chain:
            return [tuple(ordered)]
        found: list[tuple[str, ...]] = []
        for stage in ordered:
            if found and not STAGES.get(stage).own_job and not STAGES.get(found[-1][-1]).own_job:
                found[-1] += (stage,)
            else:
                found.append((stage,))
        return found

    def executor(self, folder: Path, stages: tuple[str, ...], after: list[SubmittedJob], array: bool = False) -> Any:
        """submitit's, with the options for a job of these stages."""
        from submitit import SlurmExecutor

        class Executor(SlurmExecutor):
            @classmethod
            def affinity(cls) -> int:
                return 1  # `launch` has looked for SLURM, and a dry run needs none

        logs = folder.absolute() / queue.FOLDER / "%j"
        # the supervisor takes the place of the shell, so that signals for the batch script reach it
        python = None if array else f"exec {shlex.quote(sys.executable)}"
        executor = Executor(logs, python=python, max_num_timeout=self.config.max_attempts)
        executor.update_parameters(**self.options(folder, stages, array))
        if after:
            executor.update_parameters(dependency=f"afterok:{after[-1].id}")
        return executor

    def options(self, folder: Path, stages: tuple[str, ...], array: bool) -> dict[str, Any]:
        """Of submitit's executor; what is empty is left to the cluster."""
        config = self.config
        small = config.chain and all(STAGES.get(stage).own_job for stage in stages)
        on_cpus = config.chain and not any(STAGES.get(stage).needs_gpus for stage in stages)
        gpus = 0 if on_cpus else min(config.gpus_per_node, 1) if small else config.gpus_per_node
        given = {
            "partition": (config.cpu_partition if on_cpus else "") or config.partition, "account": config.account,
            "qos": config.qos, "constraint": config.constraint, "exclude": config.exclude, "comment": config.comment,
            "gpus_per_node": gpus, "setup": list(config.setup),
        }  # fmt: skip
        more = {"requeue": True, "kill-on-invalid-dep": "yes", "mem": config.mem, "reservation": config.reservation}
        extra = {name.lstrip("-"): value or True for name, _, value in (word.partition("=") for word in config.sbatch)}
        return {name: value for name, value in given.items() if value} | {
            "job_name": f"dvae-{folder.absolute().name}",
            "time": self.minutes,
            "nodes": 1 if small else config.nodes,
            "ntasks_per_node": 1 if small else self.per_node,
            "cpus_per_task": config.cpus_per_task,
            "signal_delay_s": config.signal_seconds,
            "stderr_to_stdout": True,
            "use_srun": array,
            "additional_parameters": {name: value for name, value in more.items() if value} | extra,
        }

    def plan(self, folder: Path, stages: list[str]) -> str:
        """The sbatch file of each job."""
        found: list[str] = []
        for executor, _, count, doing in self.submissions(folder, stages, []):
            if count > 1:
                executor.parameters["map_count"] = count
            text = executor._make_submission_file_text(executor._submitit_command_str, "")
            found += [f"--- sbatch file of {', '.join(doing)}", text.rstrip()]
        return "\n".join(found)


@dataclass(frozen=True)
class ArrayTask:
    """What the jobs of an array do that write a run's shards, or its cache, together; the job after them publishes."""

    folder: str
    stage: str
    parts: int

    def __call__(self, part: int) -> None:
        from dvae.runs.folder import Run
        from dvae.stages.base import open_stage

        run = Run(Path(self.folder))
        open_stage(self.stage, run.own_config()).run_part(run, part, self.parts)

    def checkpoint(self, part: int) -> Any:
        """submitit calls it when the job's time is nearly over, and requeues it: what is finished is on disk."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, part)


@contextmanager
def hidden_job_environment() -> Iterator[None]:
    """Hide what a job that this process may be part of has left in the environment: sbatch would take it for options.

    SLURM_CONF, which says where the cluster is, stays, and so do the user's defaults for sbatch.
    """
    inside = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "MASTER_", "LOCAL_", "RANK", "WORLD_SIZE")
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(inside) and name != CONF}
    try:
        yield
    finally:
        os.environ.update(hidden)


def follow(folder: Path) -> None:
    """Show the run's figures until it ends. Ctrl-C leaves it alone; SIGTERM cancels it, as it would end a run here."""
    from dvae.runs import manage

    def asked(number: int, frame: object) -> None:
        raise Stopped(f"run={folder} was canceled ({signal.Signals(number).name}): the same command again resumes")

    with handling([signal.SIGTERM], asked):
        try:
            for line in manage.follow(folder):
                print(line, flush=True)
        except KeyboardInterrupt:
            print(f"{folder}: goes on without being watched", flush=True)
        except Stopped:
            for line in manage.cancel(folder):
                print(line, flush=True)
            raise


def time_limit_minutes(time: str) -> int:
    """A time limit as SLURM writes it, in minutes, rounded up: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    found = TIME.fullmatch(time.strip())
    if not found:
        raise UserError(f"launcher.time={time}: use minutes, HH:MM:SS or D-HH:MM:SS")
    numbers = [int(found[name]) for name in ("first", "second", "third") if found[name] is not None]
    if found["days"] is not None:
        hours, minute, second = [*numbers, 0, 0][:3]
        hours += 24 * int(found["days"])
    else:
        hours, minute, second = numbers if len(numbers) == 3 else (0, *[*numbers, 0][:2])
    total = 60 * hours + minute + (second > 0)
    if total < 1:
        raise UserError(f"launcher.time={time}: use a minute or more")
    return total


def sbatch_error(error: BaseException) -> str:
    """What sbatch said, without what submitit puts around it."""
    said = getattr(error, "stderr", None) or getattr(error, "output", None) or str(error)
    text = said.decode() if isinstance(said, bytes) else str(said)
    lines = [line for line in text.splitlines() if "sbatch: error:" in line] or text.splitlines()
    return fold(" ".join(line.replace("sbatch: error:", "") for line in lines))
