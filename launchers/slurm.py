"""Submit the job to SLURM through submitit. The command then returns, or follows the run."""

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
"""A time limit in SLURM's notation; see `time_limit_minutes`."""
CONF = "SLURM_CONF"
"""Environment variable with the path of the cluster's configuration."""


@LAUNCHERS.register("slurm")
class Slurm(Launcher):
    """Runs the job on SLURM, with one rank per GPU. The job is requeued until the run is finished."""

    elsewhere = True

    @dataclass(kw_only=True, slots=True)
    class Config(LauncherConfig):
        """Settings of the launcher slurm."""

        partition: str = ""
        """Partition of the job (empty: the cluster's default)."""
        account: str = ""
        """Account that is charged for the job (empty: the cluster's default)."""
        qos: str = ""
        """Quality of service of the job (empty: the cluster's default)."""
        nodes: int = 1
        """Number of nodes, 1 or more."""
        gpus_per_node: int = 0
        """GPUs on each node, with one rank per GPU."""
        tasks_per_node: int = 0
        """Ranks on each node (0: one per GPU, or one rank if there are no GPUs)."""
        cpus_per_task: int = 4
        """CPU cores of each rank, including its data workers, 1 or more."""
        mem: str = ""
        """Memory of each node, such as "64G" (empty: the cluster's default)."""
        time: str = "24:00:00"
        """Time limit of a job in SLURM's notation: minutes, H:MM:SS or D-HH:MM:SS. The run may take several jobs."""
        constraint: str = ""
        """Features that the nodes must have (empty: none)."""
        reservation: str = ""
        """Reservation that the job uses (empty: none)."""
        exclude: str = ""
        """Nodes that the job must not use (empty: none)."""
        comment: str = ""
        """Comment that SLURM stores with the job."""
        setup: list[str] = field(default_factory=list)
        """Shell commands to run before the ranks start, such as ["module load cuda", "export NCCL_DEBUG=INFO"]."""
        python: str = ""
        """Python command of the ranks (empty: the current Python). It may use a container, such as "apptainer exec --nv
        dvae.sif python"."""
        srun: list[str] = field(default_factory=list)
        """Additional options of srun, such as ["--container-image=dvae.sqsh"]."""
        sbatch: list[str] = field(default_factory=list)
        """Additional options of sbatch, such as ["--mail-type=FAIL", "--exclusive"]."""
        signal_seconds: int = 120
        """Seconds before the time limit at which the ranks are asked to save. SLURM may ask up to a minute earlier."""
        start_seconds: int = 600
        """Seconds within which the first rank must start. Otherwise the job is requeued, to get other nodes."""
        max_attempts: int = 3
        """Maximum number of consecutive attempts that end in a failure or a requeue without saving anything."""
        retry_seconds: float = 30.0
        """Seconds before the ranks start again after a failure. The pause doubles with every further failure."""
        wait: bool | None = None
        """Follow the run until it ends; Ctrl-C stops following, not the run (null: only on a terminal)."""
        chain: bool = False
        """Submit a separate job for each part of the run, each after the job before it: shards and cache on
        cpu_partition, the training, and the evaluation on one node."""
        cpu_partition: str = ""
        """For chain=true: partition of the stages shards and cache (empty: the same as for the other stages)."""
        array_jobs: int = 4
        """For chain=true: number of jobs that build the shards, and that write the cache, as a job array."""

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
        """Number of ranks on each node."""
        return self.config.tasks_per_node or self.config.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        return int(self.config.nodes) * self.per_node

    def launch(self, folder: Path) -> None:
        """Submit the run, and follow it if `waits` is true.

        Raises UserError if SLURM refuses a job, and MachineError if the run fails while it is followed.
        """
        from dvae.runs.folder import Run

        if not queue.is_available():
            raise UserError("launcher=slurm: there is no squeue here: run this on a login node of the cluster")
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
        """Whether the command follows the run until it ends."""
        return sys.stdout.isatty() if self.config.wait is None else bool(self.config.wait)

    def can_attach(self, folder: Path) -> bool:
        return self.waits and bool(queue.active_jobs(folder))

    def attach(self, folder: Path) -> None:
        follow(folder)

    def submit(self, folder: Path, stages: list[str]) -> list[SubmittedJob]:
        """Submit a job or a chain of jobs. If SLURM refuses one of them, cancel the ones before it.

        Raises UserError if SLURM refuses a job.
        """
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        submitted: list[SubmittedJob] = []
        with (
            hidden_job_environment(),
            redirect_stderr(StringIO()),
        ):  # submitit prints the output of sbatch; here, the error message contains it in one line
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
        """Yield the executor, the work, the number of jobs and the stages of each submission.

        More than one job form a job array. Each submission waits for the last job in `submitted`. So a caller that
        submits must append each job to this list before it takes the next submission.
        """
        from dvae.runs.slurm.supervisor import Supervisor

        here = str(folder.absolute())
        for part in self.stages_by_job(stages):
            count = self.config.array_jobs
            if self.config.chain and STAGES.get(part[0]).in_parts and count > 1:
                yield self.executor(folder, part, submitted, array=True), ArrayTask(here, part[0], count), count, part
            yield self.executor(folder, part, submitted), Supervisor(here, part), 1, part

    def stages_by_job(self, stages: list[str]) -> list[tuple[str, ...]]:
        """Return the stages of each job, in their order. Without `chain`, one job runs all stages."""
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
        """Return submitit's executor, with the options of a job that runs these stages after the jobs `after`."""
        from submitit import SlurmExecutor

        class Executor(SlurmExecutor):
            @classmethod
            def affinity(cls) -> int:
                return 1  # SLURM counts as available: `launch` has checked it, and a dry run does not need it

        logs = folder.absolute() / queue.FOLDER / "%j"
        # With exec, the supervisor replaces the shell. So signals for the batch script reach it.
        python = None if array else f"exec {shlex.quote(sys.executable)}"
        executor = Executor(logs, python=python, max_num_timeout=self.config.max_attempts)
        executor.update_parameters(**self.options(folder, stages, array))
        if after:
            executor.update_parameters(dependency=f"afterok:{after[-1].id}")
        return executor

    def options(self, folder: Path, stages: tuple[str, ...], array: bool) -> dict[str, Any]:
        """Return the options of submitit's executor. Empty settings are left out, so the cluster's defaults apply."""
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
        """Return the sbatch file of each job."""
        found: list[str] = []
        for executor, _, count, doing in self.submissions(folder, stages, []):
            if count > 1:
                executor.parameters["map_count"] = count
            text = executor._make_submission_file_text(executor._submitit_command_str, "")
            found += [f"--- sbatch file of {', '.join(doing)}", text.rstrip()]
        return "\n".join(found)


@dataclass(frozen=True)
class ArrayTask:
    """The work of one job of an array: a part of a stage, such as shards or cache. The next job publishes all parts."""

    folder: str
    stage: str
    parts: int

    def __call__(self, part: int) -> None:
        from dvae.runs.folder import Run
        from dvae.stages.base import open_stage

        run = Run(Path(self.folder))
        open_stage(self.stage, run.own_config()).run_part(run, part, self.parts)

    def checkpoint(self, part: int) -> Any:
        """Return the work of the requeued job. submitit calls this shortly before the time limit, and requeues the job.

        The finished work is on disk already, so the requeued job does the same part again and continues from there.
        """
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, part)


@contextmanager
def hidden_job_environment() -> Iterator[None]:
    """Hide the environment variables of the SLURM job to which this process may belong, while the block runs.

    sbatch would otherwise use them as options. SLURM_CONF, which locates the cluster, is kept. The user's defaults for
    sbatch (SBATCH_*) are kept too.
    """
    inside = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_", "MASTER_", "LOCAL_", "RANK", "WORLD_SIZE")
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith(inside) and name != CONF}
    try:
        yield
    finally:
        os.environ.update(hidden)


def follow(folder: Path) -> None:
    """Print the run's metrics until it ends. Ctrl-C stops only the printing.

    SIGTERM cancels the run, because SIGTERM would also end a run on this machine.
    """
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
    """Return a time limit in minutes, rounded up.

    SLURM's notations are M, M:S, H:M:S, D-H, D-H:M and D-H:M:S. Raises UserError for other texts, and for less than a
    minute.
    """
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
    """Return the error message of sbatch in one line, without the text that submitit adds."""
    said = getattr(error, "stderr", None) or getattr(error, "output", None) or str(error)
    text = said.decode() if isinstance(said, bytes) else str(said)
    lines = [line for line in text.splitlines() if "sbatch: error:" in line] or text.splitlines()
    return fold(" ".join(line.replace("sbatch: error:", "") for line in lines))
