"""The supervisor of a run on SLURM. The batch script runs it on the first node of the job.

It hosts the store through which the ranks find each other, starts the ranks with srun, and prints their end in one
line. Then it decides what follows:

- The job is finished, or has failed for good.
- After a failure that may not occur again, the ranks restart in the same allocation.
- If the time limit is near, or if SLURM preempts the job, the supervisor requeues the job.

If SLURM itself requeues the job, for example because a node failed, the supervisor starts from the beginning. Each
start of the ranks is a row of attempts.jsonl.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from dvae.errors import MachineError, Stopped, UserError, describe, fold
from dvae.runs import attempts
from dvae.runs.attempts import TERMINATED, Attempt
from dvae.runs.exit_status import GRACE, RankExit, raise_for
from dvae.runs.slurm import queue
from dvae.runs.slurm.rank import ENDED_KEY, STARTED_KEY, STOP_SIGNALS
from dvae.tracking.console import say
from dvae.utils.number_types import Positive, Seconds
from dvae.utils.read import check, parse_json, read_yaml
from dvae.utils.secrets import guard_streams

POLL_SECONDS = 0.2
"""Seconds between two checks of the ranks."""
ABANDON_FRACTION = 1 / 3
"""Ranks that still run are killed this fraction of `signal_seconds` before the time limit."""
TIME_LIMIT_SIGNALS = ("SIGUSR1", "SIGUSR2")
"""Signals that announce the time limit: the ranks save, and the job is requeued."""
FAILED = re.compile(r"srun: error: (?P<host>\S+): tasks? (?P<tasks>[\d,\[\]-]+): (?P<how>.+)")
"""A message of srun about tasks that failed."""


@dataclass
class SupervisorSettings:
    """The settings of launchers/slurm.py that the supervisor uses."""

    max_attempts: Positive
    retry_seconds: Seconds
    start_seconds: Seconds
    signal_seconds: Seconds
    python: str
    srun: list[str]


@dataclass(frozen=True)
class Supervisor:
    """Runs stages of a run folder.

    It holds only names, and reads the settings when it starts, because a job may wait for a long time.
    """

    folder: str
    """Path of the run folder."""
    stages: tuple[str, ...] = ()
    """The stages to run. Empty: all stages of the config."""

    def __call__(self) -> None:
        """Run in the batch script. If the run fails, ends this process with the exit status of the attempt."""
        guard_streams()
        try:
            self.supervise()
        except (UserError, MachineError, OSError) as error:
            words = describe(error)
            if words is None:
                raise
            say(f"error: {words[0]}")
            sys.exit(words[1])

    def supervise(self) -> None:
        """Restart the ranks until they finish, the retries are exhausted, or the job is requeued.

        Raises the error of the last attempt, or Stopped if the run was asked to stop.
        """
        folder, job = Path(self.folder), os.environ["SLURM_JOB_ID"]
        asked: list[str] = []
        for number in STOP_SIGNALS:  # only note the signal: the ranks receive it too, save and end
            signal.signal(number, lambda number, frame: asked.append(signal.Signals(number).name))
        while True:
            settings = self.settings()
            try:
                with attempts.recorded(folder, "slurm", int(os.environ["SLURM_NTASKS"]), job):
                    RankStep(self, settings, job).run()
                return
            except Stopped as error:
                why = error.stop_reason
                if why not in TIME_LIMIT_SIGNALS and not queue.is_preempted(job):
                    raise
                self.check_attempts_left(job, settings["max_attempts"], error)
                say(f"{fold(error)}; job {job} goes back into the queue")
                queue.requeue_job(job)
            except MachineError as error:
                if not error.retryable or asked:
                    raise
                times = self.check_attempts_left(job, settings["max_attempts"], error)
                pause = settings["retry_seconds"] * 2 ** (times - 1)
                say(f"{fold(error)}; attempt {times + 1} of {settings['max_attempts']} begins in {pause:g} s")
                self.pause(pause, asked)

    @staticmethod
    def pause(seconds: float, asked: list[str]) -> None:
        """Pause between two attempts. Raises Stopped if a signal arrives."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if asked:
                raise Stopped(f"stopped between two attempts ({asked[0]}): the same command again resumes", asked[0])
            time.sleep(POLL_SECONDS)

    def settings(self) -> dict[str, Any]:
        """Return the launcher's settings in config.yaml. Raises MachineError if they are damaged."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        path = Path(self.folder) / "config.yaml"
        try:
            config = OmegaConf.create({"launcher": None} | read_yaml(path))
            node = config.launcher
            settings: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        except OmegaConfBaseException as error:
            raise MachineError(f"{path}: {fold(error)[:200]}") from None
        check(SupervisorSettings, settings, f"{path}: launcher")
        return dict(settings)

    def check_attempts_left(self, job: str, most: int, error: MachineError) -> int:
        """Return the number of consecutive attempts without progress; see `attempts_without_progress`.

        Raises MachineError, with the message of `error`, if the number has reached `most`.
        """
        times = attempts_without_progress(attempts.read(Path(self.folder)), job, last_progress_time(Path(self.folder)))
        if times < most:
            return times
        failure = MachineError(
            f"{fold(error)}; that was attempt {times} of launcher.max_attempts={most} that got no further"
        )
        failure.exit_status = error.exit_status
        raise failure from None


def attempts_without_progress(tried: list[Attempt], job: str, kept: float) -> int:
    """Count the attempts of a job that made no progress after the run last saved something. The result is at least 1.

    `kept` is the time of the last save, in seconds since 1970. The attempt that made this save counts too.
    """
    mine = [attempt for attempt in tried if attempt.job == job]
    return max(1, sum(attempt.started > kept for attempt in mine) + any(attempt.started <= kept for attempt in mine))


def last_progress_time(folder: Path) -> float:
    """Return the time of the run's last checkpoint or finished stage, in seconds since 1970. 0 if there is none."""
    kept = [folder / "stages.json", *folder.glob("checkpoints/*/step-*")]
    return max((path.stat().st_mtime for path in kept if path.exists()), default=0.0)


class RankStep:
    """The ranks of one attempt. They are a job step of SLURM, with one task for each rank."""

    def __init__(self, supervisor: Supervisor, settings: dict[str, Any], job: str) -> None:
        import torch.distributed as dist  # here, because it takes seconds, and composing a config imports the launchers

        self.folder, self.job, self.settings = Path(supervisor.folder), job, settings
        self.count = int(os.environ["SLURM_NTASKS"])
        self.host = os.environ["SLURMD_NODENAME"]
        # The store is hosted here and not in rank 0: the system chooses a free port, and the store outlives every rank.
        self.store = dist.TCPStore(self.host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5))
        self.rank_arguments = [supervisor.folder, *supervisor.stages]
        self.killed_tasks: dict[int, RankExit] = {}
        """Failed tasks that srun has reported, by rank."""
        self.exits_before_kill: list[RankExit] | None = None
        """Exits of the ranks that had ended before the others were killed. None if none were killed."""

    def run(self) -> None:
        """Start the ranks, and wait for their end. Raises an error unless all ranks have finished."""
        srun = subprocess.Popen(self.command(), env=self.environment(), stderr=subprocess.PIPE, text=True)
        listener = threading.Thread(target=self.read_srun_messages, args=(srun,), daemon=True)
        listener.start()
        over = self.wait_for_end(srun)
        listener.join()
        ends = self.exits() if self.exits_before_kill is None else self.exits_before_kill
        failed = [end for end in ends if end.failed]
        stopped = next((end for end in ends if end.status == TERMINATED), None)
        if failed:
            raise_for(self.folder, failed, STOP_SIGNALS)
        if over:
            raise Stopped(f"{over} ({self.folder})", TIME_LIMIT_SIGNALS[1])
        if stopped:
            raise Stopped(stopped.message, stopped.stop_reason)
        if srun.returncode:
            raise MachineError(f"srun ended with exit status {srun.returncode}; see {self.logs()}")

    def command(self) -> list[str]:
        """Return the command line of srun."""
        python = shlex.split(self.settings["python"]) or [sys.executable]
        threads = os.environ.get("SLURM_CPUS_PER_TASK")
        # Ranks that have saved may end before the others. Depending on the cluster's configuration, srun would then
        # kill the others too early. With these options, only the supervisor decides when to kill them.
        return [
            "srun", "--kill-on-bad-exit=0", "--wait=0", f"--output={self.logs()}/rank-%t.log", "--open-mode=append",
            *([f"--cpus-per-task={threads}"] if threads else []), *self.settings["srun"],
            *python, "-u", "-m", "dvae.runs.slurm.rank", *self.rank_arguments,
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Return the environment of the ranks, with the address of the store."""
        port = str(self.store.port)
        return dict(os.environ) | {
            "MASTER_ADDR": self.host, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip

    def logs(self) -> Path:
        """Return the folder of the job's logs."""
        return self.folder / queue.FOLDER / self.job

    def read_srun_messages(self, srun: subprocess.Popen[str]) -> None:
        """Record the failed tasks that srun reports on stderr, and copy all its messages to the log."""
        assert srun.stderr is not None
        for line in srun.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            if found := FAILED.search(line):
                status = exit_status_of(found["how"])
                for number in task_numbers(found["tasks"]):
                    self.killed_tasks.setdefault(number, RankExit(number=number, status=status))

    def wait_for_end(self, srun: subprocess.Popen[str]) -> str:
        """Wait until all ranks have ended, and kill ranks that do not end by themselves.

        The remaining ranks are killed GRACE seconds after one has failed, shortly before the job's time limit, or if no
        rank starts within `start_seconds`. Returns the reason why the job should be requeued, or "" if it should not.
        """
        limit, patience, deadline = queue.end_time(self.job), self.settings["start_seconds"], None
        began = time.monotonic()
        while srun.poll() is None:
            time.sleep(POLL_SECONDS)
            why = ""
            if deadline is None and any(end.failed for end in self.exits()):
                deadline = time.monotonic() + GRACE
            if limit is not None and time.time() > limit - ABANDON_FRACTION * self.settings["signal_seconds"]:
                why = "the ranks did not save and end before the job's time limit"
            elif time.monotonic() > began + patience and not any(self.reports(STARTED_KEY)):
                why = f"no rank has begun within launcher.start_seconds={patience}"
            if why or (deadline is not None and time.monotonic() > deadline):
                self.exits_before_kill = self.exits()
                self.kill(srun)
                return why
        return ""

    def kill(self, srun: subprocess.Popen[str]) -> None:
        """Kill the remaining ranks, and wait until srun has ended."""
        step = next((hello["step"] for hello in self.reports(STARTED_KEY)), None)
        if step is None:  # no rank has reported the number of the job step, which scancel needs
            srun.send_signal(signal.SIGQUIT)  # srun then kills its tasks and ends, unless it waits for SLURM
            with suppress(subprocess.TimeoutExpired):
                srun.wait(2 * GRACE)
            srun.kill()
        else:
            with suppress(MachineError):  # the step may have ended in the meantime
                queue.cancel_job(f"{self.job}.{step}", "KILL")
        srun.wait()

    def exits(self) -> list[RankExit]:
        """Return the exits of the ranks so far.

        Ranks that ended without a report come first. Something killed them, which probably made the others fail.
        """
        told = {row["number"]: RankExit(**row) for row in self.reports(ENDED_KEY)}
        return [end for end in self.killed_tasks.values() if end.number not in told] + list(told.values())

    def reports(self, key: str) -> Iterator[dict[str, Any]]:
        """Yield the reports of all ranks that have sent one. `key` is STARTED_KEY or ENDED_KEY."""
        for number in range(self.count):
            if self.store.check([f"{key} {number}"]):
                yield {"number": number} | parse_json(self.store.get(f"{key} {number}"), f"rank {number}")


def task_numbers(tasks: str) -> list[int]:
    """Parse a list of task numbers in srun's notation: "0", "0-2,5", "[1,3]"."""
    found: list[int] = []
    for part in tasks.strip("[]").split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def exit_status_of(how: str) -> int:
    """Turn srun's description of the end of a task into an exit status: minus the signal number for a signal.

    An exit code above 128 also means a signal. SIGKILL is assumed if the description is unknown.
    """
    if code := re.search(r"exit code (\d+)", how):
        return int(code[1]) if int(code[1]) <= 128 else 128 - int(code[1])
    names = {signal.strsignal(number): -number for number in signal.valid_signals()}
    return next((status for name, status in names.items() if name and how.startswith(name)), -signal.SIGKILL)
