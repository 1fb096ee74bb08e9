"""Run the job as several processes of this machine, which live and die together."""

from __future__ import annotations

import faulthandler
import json
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

from dvae import attempts
from dvae.errors import MachineError, UserError, in_words, one_line
from dvae.machine import cores

GRACE = 5.0
"""Seconds that the other ranks have to end by themselves once one has failed; then they are killed."""
LOOK_EVERY = 0.2
"""Seconds after which ranks are looked at, whether or not one is heard to have ended."""
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
STOPPED, LOST, HANGS, CRASHED = 143, 75, 76, 1
"""Exit statuses of a rank: stopped on request and saved; another rank is gone, or stands still; an error that nobody
foresaw."""
LAST_WORDS = 2.0
"""Seconds that a rank which stands still has to say where, before it is killed."""


@dataclass
class Rank:
    """One process, and the line in which it said why it failed."""

    number: int
    process: SpawnProcess
    line: connection.Connection
    said: str = ""

    def ended(self) -> bool:
        """Whether the process is gone; then `said` is what it left."""
        if self.process.is_alive():
            return False
        with self.line, suppress(EOFError):  # it ended well, or without a word
            if self.line.poll():  # an orphan of the rank's may hold the other end: never wait for it
                self.said = self.line.recv()
        return True


def launch(folder: Path, count: int) -> None:
    """Take the run folder through its stages on `count` ranks; returns when they are finished.

    Raises what the first failing rank raised, or MachineError with that rank's number, signal or status and last step.
    """
    if torch.cuda.is_available() and count > torch.cuda.device_count():
        raise UserError(f"launcher.count={count}: this machine has {torch.cuda.device_count()} GPUs: use no more ranks")
    with attempts.recorded(folder, "processes", count):
        run(folder, count)


def run(folder: Path, count: int) -> None:
    """Start the ranks, and see how they end."""
    # here, not in rank 0: no port is guessed, and it outlives every rank
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(minutes=5))
    ranks: list[Rank] = []
    with passing_on(ranks) as passed:
        for number in range(count):
            ranks.append(start(folder, number, count, store.port))
        failed = watch(ranks)
    if failed:
        explain(folder, failed, passed)
    stopped = next((rank for rank in ranks if rank.process.exitcode == STOPPED), None)
    if stopped:
        raise with_status(stopped.said, STOPPED)


def start(folder: Path, number: int, count: int, port: int) -> Rank:
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
    return Rank(number, process, line)


def run_rank(folder: str, line: connection.Connection) -> None:
    """What a rank's process does. An error that has words for the user goes to the launcher, which alone prints it."""
    os.setpgrp()  # Ctrl-C reaches the launcher alone, which passes it on: twice would mean to end at once
    threading.Thread(target=end_with_parent, daemon=True).start()
    faulthandler.enable()
    faulthandler.register(signal.SIGQUIT, chain=True)  # says where it is, and ends
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        from dvae.job import Job  # here, since the launcher itself has no use for DeepSpeed
        from dvae.training import watch

        def on_hang(words: str, speaks: bool) -> None:
            line.send(words)
            watch.end(HANGS)

        watch.on_hang = on_hang
        Job(folder)()
    except BaseException as error:  # noqa: BLE001 told to the launcher, whatever it is
        words = in_words(error)
        if words is None:
            traceback.print_exc()
        said, status = words or (f"{type(error).__name__}: {one_line(error)}", CRASHED)
        line.send(said)
        sys.exit(status)


def end_with_parent() -> None:
    """Do not outlive the launcher, even where it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def passing_on(ranks: list[Rank]) -> Iterator[list[int]]:
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


def watch(ranks: list[Rank]) -> list[Rank]:
    """Wait for all ranks, and kill what is left GRACE seconds after one has failed. Returns those that failed, in the
    order in which they ended, without the killed."""
    left, failed = list(ranks), []
    deadline = None
    while left:
        connection.wait([rank.process.sentinel for rank in left], LOOK_EVERY)
        ended = [rank for rank in left if rank.ended()]
        left = [rank for rank in left if rank not in ended]
        failed += [rank for rank in ended if rank.process.exitcode not in (0, STOPPED)]
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() >= deadline:
            if any(rank.process.exitcode == HANGS for rank in failed):
                let_speak(left)
            for rank in left:
                rank.process.kill()
                rank.process.join()
            break
    return failed


def let_speak(ranks: list[Rank]) -> None:
    """Have ranks that stand still say where, on stderr, through Python's faulthandler; it ends them."""
    for rank in ranks:
        for number in (signal.SIGQUIT, signal.SIGCONT):  # a stopped process hears nothing until it may go on
            if rank.process.is_alive() and rank.process.pid:
                os.kill(rank.process.pid, number)
    deadline = time.monotonic() + LAST_WORDS
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))


def explain(folder: Path, failed: list[Rank], passed: list[int]) -> None:
    """Raise, in one line, what ended the job: the first rank that did not merely lose another."""
    rank = next((rank for rank in failed if rank.process.exitcode != LOST), failed[0])
    status = rank.process.exitcode or 0
    if -status in passed:
        raise with_status(f"ended by {signal.Signals(-status).name}: the same command again resumes", 128 - status)
    if status == HANGS:
        raise MachineError(rank.said)
    if status == UserError.exit_status:
        raise UserError(rank.said)
    if status == 130:
        raise KeyboardInterrupt
    how = f"ended by {signal.Signals(-status).name}" if status < 0 else f"failed with exit status {status}"
    why = f": {rank.said}" if rank.said else "; the other ranks were stopped: the same command again resumes"
    raise MachineError(f"rank {rank.number} {how} after {last_step(folder)}{why}")


def with_status(message: str, status: int) -> MachineError:
    error = MachineError(message)
    error.exit_status = status
    return error


def last_step(folder: Path) -> str:
    """Where the run was, by its last row of metrics."""
    path = folder / "metrics.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    if not whole:
        return "no step on record"
    row = json.loads(whole[-1])
    return f"{row['stage']} step {row['step']}"
