"""Run the job as several processes of this machine, which live and die together."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

import torch
import torch.distributed as dist

from dvae.errors import Stopped, UserError, describe, fold
from dvae.registry.launchers.base import LAUNCHERS, Launcher, LauncherConfig
from dvae.runs import attempts
from dvae.runs.attempts import TERMINATED
from dvae.runs.exit_status import CRASHED, GRACE, HANGS, RankExit, raise_for
from dvae.utils.machine import cores, end_with_parent
from dvae.utils.secrets import guard_streams

LOOK_EVERY = 0.2
"""Seconds after which ranks are looked at, whether or not one is heard to have ended."""
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
LAST_WORDS = 2.0
"""Seconds that a rank which stands still has to say where, before it is killed."""


@dataclass
class RankProcess:
    """One process, and the line in which it says why it failed."""

    number: int
    process: SpawnProcess
    line: connection.Connection

    def ended(self) -> RankExit | None:
        """How the process ended, and what it left to say; None while it runs. To be asked no more after that."""
        if self.process.is_alive():
            return None
        said = ""
        with self.line, suppress(EOFError):  # it ended well, or without a word
            if self.line.poll():  # an orphan of the rank's may hold the other end: never wait for it
                said = self.line.recv()
        return RankExit(number=self.number, status=self.process.exitcode or 0, message=said)


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
    ranks: list[RankProcess] = []
    with passing_on(ranks) as passed:
        for number in range(count):
            ranks.append(start(folder, number, count, store.port))
        ended = watch(ranks)
    failed = [end for end in ended if end.failed]
    if failed:
        raise_for(folder, failed, passed)
    stopped = next((end for end in ended if end.status == TERMINATED), None)
    if stopped:
        raise Stopped(stopped.message, stopped.stop_reason)


def start(folder: Path, number: int, count: int, port: int) -> RankProcess:
    """Start one rank."""
    context = multiprocessing.get_context("spawn")
    theirs = {
        "RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": True,
    }  # fmt: skip
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": max(1, cores() // count)}
    before = dict(os.environ)
    os.environ.update({key: str(value) for key, value in (theirs | threads).items()})  # OpenMP reads it when loaded
    try:
        line, end = context.Pipe(duplex=False)
        process = context.Process(target=run_rank, args=(str(folder), end), name=f"rank {number}")
        process.start()
        end.close()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return RankProcess(number, process, line)


def run_rank(folder: str, line: connection.Connection) -> None:
    """What a rank's process does. An error that has words for the user goes to the launcher, which alone prints it."""
    os.setpgrp()  # Ctrl-C reaches the launcher alone, which passes it on: twice would mean to end at once
    threading.Thread(target=end_with_parent, daemon=True).start()
    guard_streams()
    faulthandler.enable()
    faulthandler.register(signal.SIGQUIT, chain=True)  # says where it is, and ends
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        from dvae.runs.job import Job  # here, since the launcher itself has no use for DeepSpeed
        from dvae.training.resilience import watchdog as watch

        def on_hang(words: str, speaks: bool) -> None:
            line.send(words)
            watch.exit_now(HANGS)

        watch.on_hang = on_hang
        Job(folder)()
    except BaseException as error:  # noqa: BLE001 told to the launcher, whatever it is
        words = describe(error)
        if words is None:
            traceback.print_exc()
        said, status = words or (f"{type(error).__name__}: {fold(error)}", CRASHED)
        line.send(said)
        sys.exit(status)


@contextmanager
def passing_on(ranks: list[RankProcess]) -> Iterator[list[int]]:
    """Pass signals on to all ranks while the block runs; gives the list of those that came."""
    passed: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        passed.append(number)
        for rank in ranks:
            if rank.process.is_alive() and rank.process.pid:
                os.kill(rank.process.pid, number)

    before = {number: signal.signal(number, pass_on) for number in PASSED_ON}
    try:
        yield passed
    finally:
        for rank in ranks:  # none are left, unless the launcher itself failed
            rank.process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def watch(ranks: list[RankProcess]) -> list[RankExit]:
    """Wait for all ranks, and kill what is left GRACE seconds after one has failed. Returns how they ended, in their
    order, without the killed."""
    left, ended = list(ranks), []
    deadline = None
    while left:
        connection.wait([rank.process.sentinel for rank in left], LOOK_EVERY)
        new = [end for end in map(RankProcess.ended, left) if end]
        left = [rank for rank in left if rank.number not in {end.number for end in new}]
        ended += new
        if deadline is None and any(end.failed for end in new):
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() >= deadline:
            if any(end.status == HANGS for end in ended):
                let_speak(left)
            for rank in left:
                rank.process.kill()
                rank.process.join()
            break
    return ended


def let_speak(ranks: list[RankProcess]) -> None:
    """Have ranks that stand still say where, on stderr, through Python's faulthandler; it ends them."""
    for rank in ranks:
        for number in (signal.SIGQUIT, signal.SIGCONT):  # a stopped process hears nothing until it may go on
            if rank.process.is_alive() and rank.process.pid:
                os.kill(rank.process.pid, number)
    deadline = time.monotonic() + LAST_WORDS
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))
