"""The watch: finds the rank that stands still without having ended, so that the others do not wait for it for ever.

The main thread of each rank says where it is (`beat`), which costs an assignment. A thread beside it publishes that at
the group's store, and looks for two things: whether any rank moves, while it is in a training step itself; and whether
the rank after it publishes at all, in a preview, a save or another stage too. Where one of them fails for `seconds`,
the rank that is furthest behind is named and every rank ends. Ranks meet at the store alone, wherever they are.

A beat is a number that counts up, on every rank alike, since all run the same program: the lowest is furthest behind.
Ranks that wait for each other often have the same; but a rank that is stopped (SIGSTOP) or whose machine is gone
publishes nothing any more, so that one is blamed first.
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

LOOKS = 10
"""Looks at the store within the time after which a rank counts as standing still; at least one in LONGEST seconds."""
LONGEST = 10.0
"""Seconds between two looks at the most."""
SUSPICIOUS = 2.5
"""Intervals between the looks that tell which ranks still publish."""
HANGS = 1
"""Exit status of a rank that ends because one stands still, unless who started it wants another."""
LEFT = "left"
"""The round that a rank shows which watches no more."""
NAMED = 8
"""Ranks that a message names at the most."""


@dataclass(frozen=True)
class Beat:
    """Where a rank's main thread is."""

    count: int = 0
    where: str = "no step"
    """In words."""
    watched: bool = False
    """Whether it is in a training step, where nothing should take long."""


_beat = Beat()


def beat(stage: str, step: int, phase: str) -> None:
    """The main thread begins `phase` ("data", "forward", "backward", "step", "end") of `step` (from 1) of `stage`."""
    global _beat
    _beat = Beat(_beat.count + 1, f"{stage} step {step} ({phase})", watched=True)


def rest(stage: str, step: int, what: str) -> None:
    """The main thread is about to do `what` may take long: it is not watched until its next beat."""
    global _beat
    _beat = Beat(_beat.count + 1, f"{stage} step {step} ({what})")


def say_and_end(words: str, speaks: bool) -> None:
    """The end of a rank whose launcher does not listen: the words on stderr, by one of the ranks."""
    if speaks:
        print(f"dvae: error: {words}", file=sys.stderr)
    end(HANGS)


def end(status: int) -> None:
    """End this process now, whatever its main thread waits for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


OnHang = Callable[[str, bool], None]
"""on_hang(words, speaks) says the words, where this rank is the one that speaks for all, and ends this process."""
on_hang: OnHang = say_and_end
"""What a rank does when one stands still. A launcher that listens puts its own here."""


@contextmanager
def watching(seconds: float) -> Iterator[None]:
    """Watch over all ranks while the block runs; 0 seconds: do not."""
    if not seconds:
        yield
        return
    watch = Watch(ranks.store_for("watch"), ranks.rank(), ranks.world_size(), seconds, on_hang)
    watch.start()
    try:
        yield
    finally:
        watch.stop()


class Watch:
    """The watch of one rank: two threads, since the store itself may stand still with the rank that holds it."""

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        count: int,
        seconds: float,
        on_hang: OnHang,
        look_up: Callable[[], Beat] = lambda: _beat,
    ) -> None:
        self.store, self.rank, self.count, self.seconds = store, rank, count, seconds
        self.on_hang, self.look_up = on_hang, look_up
        self.interval = min(seconds / LOOKS, LONGEST)
        self.done = threading.Event()
        self._rounds = 0
        """Looks at the store that were answered."""
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._publish, self._guard)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self.done.set()
        for thread in self._threads:
            thread.join(LONGEST)

    def _publish(self) -> None:
        """Publish this rank's beat, hear whether any rank moves and whether the next one publishes, and end all if not.

        One neighbor is enough: each rank has one that looks after it.
        """
        idle, silent = Idle(self.interval), Idle(self.interval)
        shown, heard, known = -1, -1, ""
        neighbor = (self.rank + 1) % self.count
        try:
            while not self.done.wait(self.interval):
                beat = self.look_up()
                self._show(beat)
                moved = self.store.add("moves", int(beat.count != shown))
                idle.tick(moving=moved != heard or not beat.watched)
                pulse = self._shown(neighbor)[0]
                silent.tick(moving=pulse != known or pulse == LEFT or self.count == 1)
                shown, heard, known = beat.count, moved, pulse
                self._rounds += 1
                if max(idle.seconds, silent.seconds) >= self.seconds and self._blame(idle.seconds >= self.seconds):
                    return
            self.store.set(f"beat {self.rank}", f"{LEFT}|{self.look_up().count}|{socket.gethostname()}|the end")
        except dist.DistError:  # the store is gone, and with it soon this rank: if not, _guard will tell
            return

    def _guard(self) -> None:
        """End this rank where the store has stopped to answer."""
        idle = Idle(self.interval)
        before = (-1, -1)
        while not self.done.wait(self.interval):
            beat = self.look_up()
            now = (self._rounds, beat.count)
            idle.tick(moving=now != before or not beat.watched)
            before = now
            if idle.seconds >= self.seconds + 2 * SUSPICIOUS * self.interval:
                self.on_hang(
                    f"rank {self.rank} on {socket.gethostname()} waits in {beat.where}, and the store of the group has "
                    f"not answered for {idle.seconds:.0f} s: the rank or the launcher that holds it stands still; the "
                    "same command again resumes",
                    True,
                )
                return

    def _show(self, beat: Beat) -> None:
        self.store.set(f"beat {self.rank}", f"{self._rounds}|{beat.count}|{socket.gethostname()}|{beat.where}")

    def _blame(self, all_idle: bool) -> bool:
        """Name who stands still, in the words of the rank that found out first, and end; False where they go on.

        That is, of the ranks that publish nothing, or else of all where `all_idle`, those that are furthest behind.
        """
        everyone = range(self.count)
        moved = self.store.add("moves", 0)
        before = [self._shown(number) for number in everyone]
        for _ in range(2):
            if self.done.wait(SUSPICIOUS / 2 * self.interval):
                return True
            self._rounds += 1
            self._show(self.look_up())
        now = [self._shown(number) for number in everyone]
        silent = [number for number in everyone if now[number][0] == before[number][0] != LEFT]
        if not silent and (not all_idle or self.store.add("moves", 0) != moved):
            return False
        among = silent or everyone
        furthest = min(int(now[number][1]) for number in among)
        behind = [number for number in among if int(now[number][1]) == furthest]
        if self.rank in behind:
            print(f"rank {self.rank} stands still here:", file=sys.stderr)
            sys.stderr.flush()
            faulthandler.dump_traceback()
        speaks = self.store.add("verdicts", 1) == 1
        self.on_hang(self.store.compare_set("verdict", "", self._words(behind, now)).decode(), speaks)
        return True

    def _shown(self, number: int) -> list[str]:
        """What a rank showed last: its round, or LEFT; beat, host, where it is. Round and beat of -1: nothing yet."""
        key = f"beat {number}"
        return self.store.get(key).decode().split("|", 3) if self.store.check([key]) else ["-1", "-1", "?", "the start"]

    def _words(self, behind: list[int], shown: list[list[str]]) -> str:
        _, _, host, where = shown[behind[0]]
        if len(behind) == 1:
            who = f"rank {behind[0]} on {host} stands"
        else:
            several = [f"{number} on {shown[number][2]}" for number in behind[:NAMED]]
            who = f"ranks {', '.join(several)}{', ...' if len(behind) > NAMED else ''} stand"
        return (
            f"{who} still in {where} for {self.seconds:g} s (launcher.hang_seconds); all "
            "ranks were stopped: the same command again resumes"
        )


class Idle:
    """Seconds without a move, of those in which this process ran: a job that was suspended as a whole does not hang."""

    def __init__(self, interval: float) -> None:
        self.seconds = 0.0
        self._most = 2 * interval
        self._at = time.monotonic()

    def tick(self, *, moving: bool) -> None:
        now = time.monotonic()
        self.seconds = 0.0 if moving else self.seconds + min(now - self._at, self._most)
        self._at = now
