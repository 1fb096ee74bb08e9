"""Run the job as several processes of this machine, which live and die together."""

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
"""Seconds that a rank which stands still has to say where, before it is killed."""


@LAUNCHERS.register("processes")
class Processes(Launcher):
    """In `launcher.ranks` processes of this machine."""

    @dataclass(kw_only=True, slots=True)
    class Config(LauncherConfig):
        ranks: int = 2
        """Ranks; no more than there are GPUs, where there are any."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        if config.ranks < 1:
            raise UserError(f"launcher.ranks={config.ranks}: use 1 or more")

    @property
    def ranks(self) -> int:
        return int(self.config.ranks)

    def launch(self, folder: Path) -> None:
        """Raises what the first failing rank did, or MachineError with its number, signal or status and last step."""
        gpus = torch.cuda.device_count()
        if gpus and self.ranks > gpus:
            raise UserError(f"launcher.ranks={self.ranks}: this machine has {gpus} GPUs: use no more ranks")
        with attempts.recorded(folder, "processes", self.ranks):
            run(folder, self.ranks)


def run(folder: Path, count: int) -> None:
    """Start the ranks, and see how they end."""
    # here, not in rank 0: no port is guessed, and it outlives every rank
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
    """Start one rank, with the variables by which torch.distributed finds the others."""
    environment = {
        "RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True,
    }  # fmt: skip
    ranks.start_function(number, run_rank, str(folder), environment=environment | thread_share(count))


def run_rank(folder: str, send: Callable[[Any], None]) -> None:
    """What a rank's process does. The launcher alone prints the error that ends it."""
    faulthandler.enable()
    faulthandler.register(signal.SIGQUIT, chain=True)  # says where it is, and ends
    warnings.filterwarnings("ignore", category=FutureWarning)
    from dvae.runs.job import RunJob  # here, since the launcher itself has no use for DeepSpeed
    from dvae.training.resilience import watchdog

    def on_hang(message: str, speaks: bool) -> None:
        send(ChildFailure(message, HANGS))
        watchdog.exit_now(HANGS)

    watchdog.on_hang = on_hang
    RunJob(folder)()


def wait_for_ranks(ranks: ChildGroup) -> list[RankExit]:
    """Wait for all ranks; GRACE seconds after one has failed, the others are killed.

    Returns how the ranks ended that were not killed, in the order of their ends.
    """
    ended = ranks.wait(lambda rank: rank_exit(rank).failed, GRACE, before_kill=report_hanging)
    return [rank_exit(rank) for rank in ended]


def rank_exit(rank: Child) -> RankExit:
    """How a rank that has ended did so."""
    return RankExit(number=rank.number, status=rank.status or 0, message=rank.failure.message if rank.failure else "")


def report_hanging(ended: list[Child], running: list[Child]) -> None:
    """If a rank ended because another one hangs: those that run print where they are, by faulthandler, and end."""
    if not any(rank.status == HANGS for rank in ended):
        return
    for rank in running:
        for number in (signal.SIGQUIT, signal.SIGCONT):  # a stopped process handles nothing until it may go on
            rank.send_signal(number)
    deadline = time.monotonic() + REPORT_SECONDS
    for rank in running:
        rank.wait(max(0.0, deadline - time.monotonic()))
