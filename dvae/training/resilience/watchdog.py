"""The watchdog: finds the rank that stands still without having ended, so that the others do not wait for it for ever.

The main thread of each rank says where it is (`heartbeat`), which costs an assignment. A thread beside it publishes
that at the group's store, and checks two things: whether any rank moves, while it is in a training step itself; and
whether the rank after it publishes at all, in a preview, a save or another stage too. If one of them fails for
`seconds`, the rank that is furthest behind is named and every rank ends. Ranks meet at the store alone.

A heartbeat has a number that counts up, on every rank alike, since all run the same program: the lowest is furthest
behind. Ranks that wait for each other often have the same; but a rank that is stopped (SIGSTOP) or whose machine is
gone publishes nothing any more, so that one is blamed first.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist

from dvae.training.resilience import ranks

POLLS = 10
"""Polls of the store in the time after which a rank counts as standing still; at least one per MAX_INTERVAL."""
MAX_INTERVAL = 10.0
"""Seconds between two polls, at most."""
SILENT_INTERVALS = 2.5
"""Poll intervals after which a rank that published nothing counts as silent."""
EXIT_STATUS = 1
"""Exit status of a rank that ends because one stands still, unless its launcher sets another."""
LEFT = "left"
"""Published in place of the round by a rank whose watchdog has stopped."""
MAX_NAMED = 8
"""Ranks that a message names, at most."""


@dataclass(frozen=True)
class Heartbeat:
    """Where a rank's main thread is."""

    count: int = 0
    where: str = "no step"
    """A description for the user."""
    watched: bool = False
    """Whether it is in a training step, where nothing should take long."""


_heartbeat = Heartbeat()


def heartbeat(stage: str, step: int, phase: str) -> None:
    """The main thread begins `phase` ("data", "forward", "backward", "step", "end") of `step` (from 1) of `stage`."""
    global _heartbeat
    _heartbeat = Heartbeat(_heartbeat.count + 1, f"{stage} step {step} ({phase})", watched=True)


def suspend(stage: str, step: int, what: str) -> None:
    """The main thread begins `what`, which may take long. It is not watched until its next heartbeat."""
    global _heartbeat
    _heartbeat = Heartbeat(_heartbeat.count + 1, f"{stage} step {step} ({what})")


def print_and_exit(message: str, reports: bool) -> None:
    """Print the message if this rank `reports`, and end this process: the handler unless a launcher sets another."""
    if reports:
        print(f"dvae: error: {message}", file=sys.stderr)
    exit_now(EXIT_STATUS)


def exit_now(status: int) -> None:
    """End this process now, whatever its main thread waits for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


HangHandler = Callable[[str, bool], None]
"""on_hang(message, reports) passes the message on if this rank `reports` for all, and ends this process."""
on_hang: HangHandler = print_and_exit
"""Called by a rank when one stands still. A launcher may put its own handler here."""


@contextmanager
def watching(seconds: float) -> Iterator[None]:
    """Watch over all ranks while the block runs; 0 seconds: do not."""
    if not seconds:
        yield
        return
    watchdog = Watchdog(ranks.store_for("watch"), ranks.rank(), ranks.world_size(), seconds, on_hang)
    watchdog.start()
    try:
        yield
    finally:
        watchdog.stop()


class Watchdog:
    """The watchdog of one rank: two threads, since the store itself may stand still with the rank that holds it."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        count: int,
        seconds: float,
        on_hang: HangHandler,
        read_heartbeat: Callable[[], Heartbeat] = lambda: _heartbeat,
    ) -> None:
        self.store, self.rank, self.count, self.seconds = store, rank, count, seconds
        self.on_hang, self.read_heartbeat = on_hang, read_heartbeat
        self.interval = min(seconds / POLLS, MAX_INTERVAL)
        self.done = threading.Event()
        self._rounds = 0
        """Polls of the store that were answered."""
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._publish, self._guard)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self.done.set()
        for thread in self._threads:
            thread.join(MAX_INTERVAL)

    def _publish(self) -> None:
        """Publish this rank's heartbeat, and end all ranks if none moves or if the next one publishes nothing.

        One neighbor is enough: each rank has one that looks after it.
        """
        idle, silent = IdleTimer(self.interval), IdleTimer(self.interval)
        last_count, last_moves, last_round = -1, -1, ""
        neighbor = (self.rank + 1) % self.count
        try:
            while not self.done.wait(self.interval):
                latest = self.read_heartbeat()
                self._publish_heartbeat(latest)
                moves = self.store.add("moves", int(latest.count != last_count))
                idle.tick(moving=moves != last_moves or not latest.watched)
                neighbor_round = self._published(neighbor)[0]
                silent.tick(moving=neighbor_round != last_round or neighbor_round == LEFT or self.count == 1)
                last_count, last_moves, last_round = latest.count, moves, neighbor_round
                self._rounds += 1
                if max(idle.seconds, silent.seconds) >= self.seconds and self._blame(idle.seconds >= self.seconds):
                    return
            self.store.set(f"beat {self.rank}", f"{LEFT}|{self.read_heartbeat().count}|{socket.gethostname()}|the end")
        except dist.DistError:  # the store is gone, and with it soon this rank: if not, _guard will tell
            return

    def _guard(self) -> None:
        """End this rank if the store does not answer any more."""
        idle = IdleTimer(self.interval)
        before = (-1, -1)
        while not self.done.wait(self.interval):
            latest = self.read_heartbeat()
            now = (self._rounds, latest.count)
            idle.tick(moving=now != before or not latest.watched)
            before = now
            if idle.seconds >= self.seconds + 2 * SILENT_INTERVALS * self.interval:
                self.on_hang(
                    f"rank {self.rank} on {socket.gethostname()} waits in {latest.where}, and the store of the group "
                    f"has not answered for {idle.seconds:.0f} s: the rank or the launcher that holds it stands still; "
                    "the same command again resumes",
                    True,
                )
                return

    def _publish_heartbeat(self, heartbeat: Heartbeat) -> None:
        values = f"{self._rounds}|{heartbeat.count}|{socket.gethostname()}|{heartbeat.where}"
        self.store.set(f"beat {self.rank}", values)

    def _blame(self, all_idle: bool) -> bool:
        """Name the ranks that stand still, and end. Returns False if they move again.

        These are the ranks that are furthest behind: among those that publish nothing, or else, if `all_idle`, among
        all. All ranks use the message of the first one that found out.
        """
        everyone = range(self.count)
        moved = self.store.add("moves", 0)
        before = [self._published(number) for number in everyone]
        for _ in range(2):
            if self.done.wait(SILENT_INTERVALS / 2 * self.interval):
                return True
            self._rounds += 1
            self._publish_heartbeat(self.read_heartbeat())
        now = [self._published(number) for number in everyone]
        silent = [number for number in everyone if now[number][0] == before[number][0] != LEFT]
        if not silent and (not all_idle or self.store.add("moves", 0) != moved):
            return False
        suspects = silent or everyone
        lowest = min(int(now[number][1]) for number in suspects)
        behind = [number for number in suspects if int(now[number][1]) == lowest]
        if self.rank in behind:
            print(f"rank {self.rank} stands still here:", file=sys.stderr)
            sys.stderr.flush()
            faulthandler.dump_traceback()
        reports = self.store.add("verdicts", 1) == 1
        self.on_hang(self.store.compare_set("verdict", "", self._message(behind, now)).decode(), reports)
        return True

    def _published(self, number: int) -> list[str]:
        """What a rank published last: its round, or LEFT; heartbeat count, host, place. -1 means nothing yet."""
        key = f"beat {number}"
        return self.store.get(key).decode().split("|", 3) if self.store.check([key]) else ["-1", "-1", "?", "the start"]

    def _message(self, behind: list[int], published: list[list[str]]) -> str:
        _, _, host, where = published[behind[0]]
        if len(behind) == 1:
            who = f"rank {behind[0]} on {host} stands"
        else:
            several = [f"{number} on {published[number][2]}" for number in behind[:MAX_NAMED]]
            who = f"ranks {', '.join(several)}{', ...' if len(behind) > MAX_NAMED else ''} stand"
        return (
            f"{who} still in {where} for {self.seconds:g} s (launcher.hang_seconds); all "
            "ranks were stopped: the same command again resumes"
        )


class IdleTimer:
    """Seconds without a move, of those in which this process ran: a job that was suspended as a whole does not hang."""

    def __init__(self, interval: float) -> None:
        self.seconds = 0.0
        self._max_tick = 2 * interval
        self._last = time.monotonic()

    def tick(self, *, moving: bool) -> None:
        now = time.monotonic()
        self.seconds = 0.0 if moving else self.seconds + min(now - self._last, self._max_tick)
        self._last = now
