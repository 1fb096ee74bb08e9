"""The watchdog: detects a rank that hangs, names it, and ends all ranks. Otherwise the others would wait forever.

The main thread of each rank calls `heartbeat`, which costs one assignment. A second thread publishes the heartbeat in
the group's store and checks two things:

- Does any rank make progress? This is checked while the rank itself is in a training step.
- Does the next rank publish anything? This is checked always, also during previews, saves and other stages.

If a check fails for `seconds`, the rank that is furthest behind is reported, and every rank ends. Ranks communicate
through the store only, because a collective would wait for the rank that hangs.

Heartbeats are counted. All ranks run the same program, so the rank with the lowest count is furthest behind. Ranks that
wait for each other often have the same count. But a rank that is suspended (SIGSTOP), or whose machine has failed,
publishes nothing any more. Such ranks are blamed first.
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
"""Number of polls of the store within the time limit for a hang. Polls are at most MAX_INTERVAL apart."""
MAX_INTERVAL = 10.0
"""Largest time between two polls, in seconds."""
SILENT_INTERVALS = 2.5
"""Number of poll intervals after which a rank that has published nothing counts as silent."""
EXIT_STATUS = 1
"""Exit status of a rank that ends because a rank hangs, unless its launcher sets another."""
LEFT = "left"
"""Published instead of the round by a rank whose watchdog was stopped normally."""
MAX_NAMED = 8
"""Largest number of ranks that a message names."""


@dataclass(frozen=True)
class Heartbeat:
    """The position of a rank's main thread in the program."""

    count: int = 0
    """Number of heartbeats so far."""
    where: str = "no step"
    """Description of the position, for messages."""
    watched: bool = False
    """Whether the thread is in a training step, in which no phase should take long."""


_heartbeat = Heartbeat()


def heartbeat(stage: str, step: int, phase: str) -> None:
    """Record that the main thread starts a phase of a training step.

    Phases are "data", "forward", "backward", "step" and "end". `step` counts from 1.
    """
    global _heartbeat
    _heartbeat = Heartbeat(_heartbeat.count + 1, f"{stage} step {step} ({phase})", watched=True)


def suspend(stage: str, step: int, what: str) -> None:
    """Record that the main thread starts `what`, which may take long. It is not watched until its next heartbeat."""
    global _heartbeat
    _heartbeat = Heartbeat(_heartbeat.count + 1, f"{stage} step {step} ({what})")


def print_and_exit(message: str, reports: bool) -> None:
    """Print the message if this rank `reports`, and end the process. This is the default of `on_hang`."""
    if reports:
        print(f"dvae: error: {message}", file=sys.stderr)
    exit_now(EXIT_STATUS)


def exit_now(status: int) -> None:
    """End the process at once, even if its main thread is blocked.

    sys.exit would only end the calling thread, and os._exit does not flush the streams.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


HangHandler = Callable[[str, bool], None]
"""on_hang(message, reports) prints or sends the message if `reports` is true, and ends the process."""
on_hang: HangHandler = print_and_exit
"""Called on every rank if a rank hangs. A launcher may set its own handler."""


@contextmanager
def watching(seconds: float) -> Iterator[None]:
    """Run the watchdog while the block runs. `seconds` is the time limit for a hang (0: no watchdog)."""
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
    """The watchdog of one rank.

    It has two threads. One communicates with the store. The other watches the first, which blocks if the process that
    hosts the store hangs.
    """

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
        """Number of polls that the store has answered."""
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._publish, self._guard)]

    def start(self) -> None:
        """Start both threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop both threads. Does not wait for longer than MAX_INTERVAL each, because the store may be gone."""
        self.done.set()
        for thread in self._threads:
            thread.join(MAX_INTERVAL)

    def _publish(self) -> None:
        """Publish this rank's heartbeat. End all ranks if no rank makes progress, or if the next one is silent.

        Checking one neighbor is enough: every rank is the neighbor of another one.
        """
        idle, silent = IdleTimer(self.interval), IdleTimer(self.interval)
        last_count, last_moves, last_round = -1, -1, ""
        neighbor = (self.rank + 1) % self.count
        try:
            while not self.done.wait(self.interval):
                latest = self.read_heartbeat()
                self._publish_heartbeat(latest)
                # "moves" counts the heartbeats of all ranks together, so one number shows whether any rank moves.
                moves = self.store.add("moves", int(latest.count != last_count))
                idle.tick(moving=moves != last_moves or not latest.watched)
                neighbor_round = self._published(neighbor)[0]
                silent.tick(moving=neighbor_round != last_round or neighbor_round == LEFT or self.count == 1)
                last_count, last_moves, last_round = latest.count, moves, neighbor_round
                self._rounds += 1
                if max(idle.seconds, silent.seconds) >= self.seconds and self._blame(idle.seconds >= self.seconds):
                    return
            self.store.set(f"beat {self.rank}", f"{LEFT}|{self.read_heartbeat().count}|{socket.gethostname()}|the end")
        except dist.DistError:  # the store is gone, so this rank will end soon; if it does not, _guard ends it
            return

    def _guard(self) -> None:
        """End this rank if the store does not answer any more. This thread must not call the store."""
        idle = IdleTimer(self.interval)
        before = (-1, -1)
        while not self.done.wait(self.interval):
            latest = self.read_heartbeat()
            now = (self._rounds, latest.count)
            idle.tick(moving=now != before or not latest.watched)
            before = now
            # Wait longer than _publish does: as long as the store answers, its message is the better one.
            if idle.seconds >= self.seconds + 2 * SILENT_INTERVALS * self.interval:
                self.on_hang(
                    f"rank {self.rank} on {socket.gethostname()} waits in {latest.where}, and the store of the group "
                    f"has not answered for {idle.seconds:.0f} s: the rank or the launcher that holds it stands still; "
                    "the same command again resumes",
                    True,
                )
                return

    def _publish_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Write round, count, host and position of this rank to the store; see `_published`."""
        values = f"{self._rounds}|{heartbeat.count}|{socket.gethostname()}|{heartbeat.where}"
        self.store.set(f"beat {self.rank}", values)

    def _blame(self, all_idle: bool) -> bool:
        """Find the ranks that hang, and end this rank with a message that names them.

        They are the ranks with the lowest count among the silent ranks, or, if none is silent and `all_idle` is true,
        among all ranks. Returns False, without ending, if the ranks make progress again.
        """
        everyone = range(self.count)
        moved = self.store.add("moves", 0)
        before = [self._published(number) for number in everyone]
        # Wait for SILENT_INTERVALS to see which ranks publish. Keep publishing meanwhile, or others would blame this
        # rank.
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
        if self.rank in behind:  # this rank hangs, but its watchdog thread still runs: show where the main thread is
            print(f"rank {self.rank} stands still here:", file=sys.stderr)
            sys.stderr.flush()
            faulthandler.dump_traceback()
        # Several ranks may arrive here. The first one reports. All use the message that compare_set stored first.
        reports = self.store.add("verdicts", 1) == 1
        self.on_hang(self.store.compare_set("verdict", "", self._message(behind, now)).decode(), reports)
        return True

    def _published(self, number: int) -> list[str]:
        """The last entry of a rank: round (or LEFT), heartbeat count, host, position. Round -1: nothing so far."""
        key = f"beat {number}"
        return self.store.get(key).decode().split("|", 3) if self.store.check([key]) else ["-1", "-1", "?", "the start"]

    def _message(self, behind: list[int], published: list[list[str]]) -> str:
        """The message that names the ranks `behind`, with the host and position of the first."""
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
    """Counts the seconds without progress, without the time in which this process itself was suspended.

    A tick counts for at most two intervals. So if a whole job was suspended (SLURM, Ctrl-Z), the gap does not look like
    a hang.
    """

    def __init__(self, interval: float) -> None:
        self.seconds = 0.0
        self._max_tick = 2 * interval
        self._last = time.monotonic()

    def tick(self, *, moving: bool) -> None:
        """Add the time since the last tick, or set `seconds` to 0 if there was progress."""
        now = time.monotonic()
        self.seconds = 0.0 if moving else self.seconds + min(now - self._last, self._max_tick)
        self._last = now
