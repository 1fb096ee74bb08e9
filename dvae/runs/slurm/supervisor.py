"""The supervisor of a run on SLURM: what the batch script runs, on the first node of the job.

It hosts the store at which the ranks meet, starts them with srun, and says in one line how they ended. Then it decides:
the job is done; or it has failed for good; or the ranks start anew, at once in the same allocation after a failure that
may pass, by a requeue where the time is over or another job needs the place. A job that SLURM itself requeues, since a
node was lost, begins here again. Each start is a row of attempts.jsonl.
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
"""Seconds between two looks at the ranks."""
ABANDON_FRACTION = 1 / 3
"""Of the time between the signal and the end of a job, what is left when ranks that have not ended are given up."""
TIME_LIMIT_SIGNALS = ("SIGUSR1", "SIGUSR2")
"""Signals that mean: save and come back."""
FAILED = re.compile(r"srun: error: (?P<host>\S+): tasks? (?P<tasks>[\d,\[\]-]+): (?P<how>.+)")
"""How srun tells of a task that failed."""


@dataclass
class SupervisorSettings:
    """What the supervisor uses of the settings in launchers/slurm.py."""

    max_attempts: Positive
    retry_seconds: Seconds
    start_seconds: Seconds
    signal_seconds: Seconds
    python: str
    srun: list[str]


@dataclass(frozen=True)
class Supervisor:
    """Takes a run folder through some of its stages (none named: all). Holds nothing else: a job may wait for long."""

    folder: str
    stages: tuple[str, ...] = ()

    def __call__(self) -> None:
        """In the batch script. Ends this process with the attempt's exit status."""
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
        """Start the ranks until they have finished, or there is no use in it."""
        folder, job = Path(self.folder), os.environ["SLURM_JOB_ID"]
        asked: list[str] = []
        for number in STOP_SIGNALS:  # the ranks hear it too, and act on it
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
        """Pause between two attempts. Raises Stopped where a signal asks."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if asked:
                raise Stopped(f"stopped between two attempts ({asked[0]}): the same command again resumes", asked[0])
            time.sleep(POLL_SECONDS)

    def settings(self) -> dict[str, Any]:
        """The launcher's settings, as they were when the job was submitted. Raises MachineError if they are damaged."""
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
        """How many attempts in a row have kept nothing, or at most one since something was kept. Raises MachineError
        where they are as many as there may be."""
        times = attempts_without_progress(attempts.read(Path(self.folder)), job, last_progress_time(Path(self.folder)))
        if times < most:
            return times
        failure = MachineError(
            f"{fold(error)}; that was attempt {times} of launcher.max_attempts={most} that got no further"
        )
        failure.exit_status = error.exit_status
        raise failure from None


def attempts_without_progress(tried: list[Attempt], job: str, kept: float) -> int:
    """Attempts of this job, from the last one back, that began after something was `kept` (seconds since 1970), and the
    one during which it was; at least 1."""
    mine = [attempt for attempt in tried if attempt.job == job]
    return max(1, sum(attempt.started > kept for attempt in mine) + any(attempt.started <= kept for attempt in mine))


def last_progress_time(folder: Path) -> float:
    """When something of the run was kept last: a checkpoint, a finished stage; 0 where nothing was."""
    kept = [folder / "stages.json", *folder.glob("checkpoints/*/step-*")]
    return max((path.stat().st_mtime for path in kept if path.exists()), default=0.0)


class RankStep:
    """The ranks of one attempt: a step of the job, one task for each."""

    def __init__(self, supervisor: Supervisor, settings: dict[str, Any], job: str) -> None:
        import torch.distributed as dist  # here, since it takes seconds, and launchers are imported to compose a config

        self.folder, self.job, self.settings = Path(supervisor.folder), job, settings
        self.count = int(os.environ["SLURM_NTASKS"])
        self.host = os.environ["SLURMD_NODENAME"]
        # here, not in rank 0: no port is guessed, and it outlives every rank
        self.store = dist.TCPStore(self.host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5))
        self.rank_arguments = [supervisor.folder, *supervisor.stages]
        self.killed_tasks: dict[int, RankExit] = {}
        """What srun says of tasks that it saw fail."""
        self.exits_before_kill: list[RankExit] | None = None
        """How those had ended that had when the others were killed."""

    def run(self) -> None:
        """Start them, and raise how they ended, unless they finished."""
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
        """srun with its words."""
        python = shlex.split(self.settings["python"]) or [sys.executable]
        threads = os.environ.get("SLURM_CPUS_PER_TASK")
        # who has saved may end before the others: here it is decided when the rest is given up, not by srun
        return [
            "srun", "--kill-on-bad-exit=0", "--wait=0", f"--output={self.logs()}/rank-%t.log", "--open-mode=append",
            *([f"--cpus-per-task={threads}"] if threads else []), *self.settings["srun"],
            *python, "-u", "-m", "dvae.runs.slurm.rank", *self.rank_arguments,
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        """Where the ranks meet."""
        port = str(self.store.port)
        return dict(os.environ) | {
            "MASTER_ADDR": self.host, "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip

    def logs(self) -> Path:
        """Folder of the job's logs."""
        return self.folder / queue.FOLDER / self.job

    def read_srun_messages(self, srun: subprocess.Popen[str]) -> None:
        """Hear what srun says of its tasks; all of it goes into the log as well."""
        assert srun.stderr is not None
        for line in srun.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            if found := FAILED.search(line):
                status = exit_status_of(found["how"])
                for number in task_numbers(found["tasks"]):
                    self.killed_tasks.setdefault(number, RankExit(number=number, status=status))

    def wait_for_end(self, srun: subprocess.Popen[str]) -> str:
        """Wait for all ranks; whoever is left GRACE seconds after one has failed is killed, and all are when the job's
        time is nearly over or none has begun in time. Returns why the job should come back; empty: there is no need."""
        limit, patience, deadline = queue.end_time(self.job), self.settings["start_seconds"], None
        began = time.monotonic()
        while srun.poll() is None:
            time.sleep(POLL_SECONDS)
            why = ""
            if deadline is None and any(end.failed for end in self.exits()):
                deadline = time.monotonic() + GRACE
            if limit is not None and time.time() > limit - ABANDON_FRACTION * self.settings["signal_seconds"]:
                why = "not at a place to stop before the job's time was over"
            elif time.monotonic() > began + patience and not any(self.reports(STARTED_KEY)):
                why = f"no rank has begun within launcher.start_seconds={patience}"
            if why or (deadline is not None and time.monotonic() > deadline):
                self.exits_before_kill = self.exits()
                self.kill(srun)
                return why
        return ""

    def kill(self, srun: subprocess.Popen[str]) -> None:
        """Kill what is left of the step, and wait for srun to end."""
        step = next((hello["step"] for hello in self.reports(STARTED_KEY)), None)
        if step is None:  # none has got so far as to say which step it is in
            srun.send_signal(signal.SIGQUIT)  # srun ends its tasks, and itself, unless it waits for SLURM
            with suppress(subprocess.TimeoutExpired):
                srun.wait(2 * GRACE)
            srun.kill()
        else:
            with suppress(MachineError):  # it has just ended by itself
                queue.cancel_job(f"{self.job}.{step}", "KILL")
        srun.wait()

    def exits(self) -> list[RankExit]:
        """How ranks have ended so far: those that were killed by something first, since they are why others failed."""
        told = {row["number"]: RankExit(**row) for row in self.reports(ENDED_KEY)}
        return [end for end in self.killed_tasks.values() if end.number not in told] + list(told.values())

    def reports(self, key: str) -> Iterator[dict[str, Any]]:
        for number in range(self.count):
            if self.store.check([f"{key} {number}"]):
                yield {"number": number} | parse_json(self.store.get(f"{key} {number}"), f"rank {number}")


def task_numbers(tasks: str) -> list[int]:
    """Task numbers as srun writes them: "0", "0-2,5", "[1,3]"."""
    found: list[int] = []
    for part in tasks.strip("[]").split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def exit_status_of(how: str) -> int:
    """srun's words for the end of a task as an exit status, below 0 for a signal, which above 128 means too."""
    if code := re.search(r"exit code (\d+)", how):
        return int(code[1]) if int(code[1]) <= 128 else 128 - int(code[1])
    names = {signal.strsignal(number): -number for number in signal.valid_signals()}
    return next((status for name, status in names.items() if name and how.startswith(name)), -signal.SIGKILL)
