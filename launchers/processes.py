"""Run the job as several processes on this machine. If one process fails, all end."""

from __future__ import annotations

import faulthandler
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dvae.errors import Stopped, UserError
from dvae.registry.launchers.base import LAUNCHERS, Launcher, LauncherConfig
from dvae.runs import attempts
from dvae.runs.attempts import TERMINATED
from dvae.runs.exit_status import GRACE, HANGS, RankExit, raise_for
from dvae.utils.child_processes import Child, ChildFailure, ChildGroup
from dvae.utils.machine import thread_share

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
REPORT_SECONDS = 2.0
"""Seconds that a hanging rank has to print its stack before it is killed."""


@LAUNCHERS.register("processes")
class Processes(Launcher):
    """Runs the job as `launcher.ranks` processes on this machine."""

    @dataclass(kw_only=True, slots=True)
    class Config(LauncherConfig):
        """Settings of the launcher processes."""

        ranks: int = 2
        """Number of ranks, 1 or more. If the machine has GPUs, it must not exceed their number."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.ranks < 1:
            raise UserError(f"launcher.ranks={config.ranks}: use 1 or more")

    @property
    def ranks(self) -> int:
        return int(self.config.ranks)

    def launch(self, folder: Path) -> None:
        """Run the job, and wait until all ranks have ended.

        Raises the error of the first rank that failed. If it reported none, raises MachineError with the rank, its
        signal or exit status, and the last step.
        """
        gpus = torch.cuda.device_count()
        if gpus and self.ranks > gpus:
            raise UserError(f"launcher.ranks={self.ranks}: this machine has {gpus} GPUs: use no more ranks")
        with attempts.recorded(folder, "processes", self.ranks):
            run(folder, self.ranks)


def run(folder: Path, count: int) -> None:
    """Start `count` ranks, wait until they have ended, and raise an error if one failed or was stopped."""
    # The store is hosted here and not in rank 0: the system chooses a free port, and the store outlives every rank.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5))
    with ChildGroup() as ranks, ranks.forwarding(FORWARDED_SIGNALS) as forwarded:
        for number in range(count):
            start_rank(ranks, folder, number, count, store.port)
        ended = wait_for_ranks(ranks)
    failed = [rank for rank in ended if rank.failed]
    if failed:
        raise_for(folder, failed, forwarded)
    stopped = next((rank for rank in ended if rank.status == TERMINATED), None)
    if stopped:
        raise Stopped(stopped.message, stopped.stop_reason)


def start_rank(ranks: ChildGroup, folder: Path, number: int, count: int, port: int) -> None:
    """Start one rank, with the environment variables that torch.distributed needs to connect the ranks."""
    environment = {
        "RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True,
    }  # fmt: skip
    ranks.start_function(number, run_rank, str(folder), environment=environment | thread_share(count))


def run_rank(folder: str, send: Callable[[Any], None]) -> None:
    """Run the job in the process of one rank. If it fails, only the launcher prints the error."""
    faulthandler.enable()
    # On SIGQUIT, print the stack. With chain=True, the default action then ends the process.
    faulthandler.register(signal.SIGQUIT, chain=True)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from dvae.runs.job import RunJob  # here, because it imports DeepSpeed, which the launcher does not need
    from dvae.training.resilience import watchdog

    def on_hang(message: str, speaks: bool) -> None:
        send(ChildFailure(message, HANGS))
        watchdog.exit_now(HANGS)

    watchdog.on_hang = on_hang
    RunJob(folder)()


def wait_for_ranks(ranks: ChildGroup) -> list[RankExit]:
    """Wait for all ranks. GRACE seconds after one has failed, the remaining ranks are killed.

    Returns the exits of the ranks that were not killed, in the order in which they ended.
    """
    ended = ranks.wait(lambda rank: rank_exit(rank).failed, GRACE, before_kill=report_hanging)
    return [rank_exit(rank) for rank in ended]


def rank_exit(rank: Child) -> RankExit:
    """Return the exit of a rank that has ended."""
    return RankExit(number=rank.number, status=rank.status or 0, message=rank.failure.message if rank.failure else "")


def report_hanging(ended: list[Child], running: list[Child]) -> None:
    """If a rank ended because another one hangs, let the running ranks print their stacks and end."""
    if not any(rank.status == HANGS for rank in ended):
        return
    for rank in running:
        # A process that is suspended (SIGSTOP) handles SIGQUIT only after SIGCONT.
        for number in (signal.SIGQUIT, signal.SIGCONT):
            rank.send_signal(number)
    deadline = time.monotonic() + REPORT_SECONDS
    for rank in running:
        rank.wait(max(0.0, deadline - time.monotonic()))
