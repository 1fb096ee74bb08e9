"""The watch: who is blamed where ranks stand still, and when nobody is; and two real ranks, one of which is stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch.distributed as dist
from tests_support import ROOT, environment

from dvae.training.resilience import watchdog
from dvae.training.resilience.watchdog import Heartbeat, IdleTimer, Watchdog

SECONDS = 0.5


@dataclass
class Rank:
    """What a test knows of one rank, whose watch runs in this process."""

    heartbeat: Heartbeat
    heard: list[tuple[str, bool]] = field(default_factory=list)


def start(store: dist.Store, beats: list[Heartbeat], silent: tuple[int, ...] = ()) -> tuple[list[Rank], list[Watchdog]]:
    """Ranks at `beats`; the watches of those in `silent` never run, as if they were stopped after their first look."""
    ranks = [Rank(heartbeat) for heartbeat in beats]
    watches = [
        Watchdog(
            store,
            n,
            len(beats),
            SECONDS,
            lambda *said, r=rank: r.heard.append(said),
            lambda r=rank: r.heartbeat,
        )
        for n, rank in enumerate(ranks)
    ]
    for number, one in enumerate(watches):
        one._publish_heartbeat(ranks[number].heartbeat)
        if number not in silent:
            one.start()
    return ranks, watches


def wait(seconds: float, ranks: list[Rank], everyone: list[int]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(ranks[number].heard for number in everyone):
        time.sleep(0.02)


def stop(watches: list[Watchdog], silent: tuple[int, ...] = ()) -> None:
    for number, one in enumerate(watches):
        if number not in silent:
            one.stop()


def at(count: int, where: str = "encoder step 9 (backward)", watched: bool = True) -> Heartbeat:
    return Heartbeat(count, where, watched)


def test_the_rank_that_is_furthest_behind_is_named_by_all_and_said_once() -> None:
    ranks, watches = start(dist.HashStore(), [at(40), at(37, "encoder step 9 (data)"), at(40)])
    wait(10 * SECONDS, ranks, [0, 1, 2])
    stop(watches)
    said = [words for rank in ranks for words, _ in rank.heard]
    assert len(said) == 3
    assert len(set(said)) == 1
    assert re.match(r"rank 1 on \S+ stands still in encoder step 9 \(data\) for 0\.5 s .*: the same command", said[0])
    assert sum(speaks for rank in ranks for _, speaks in rank.heard) == 1


@pytest.mark.parametrize("watched", [True, False])
def test_a_rank_that_publishes_nothing_is_blamed_first_in_training_and_outside(watched: bool) -> None:
    """Rank 2 is further behind by its beat, but it is rank 1 that is gone."""
    ranks, watches = start(dist.HashStore(), [at(40, watched=watched), at(40), at(39, watched=watched)], silent=(1,))
    wait(10 * SECONDS, ranks, [0, 2])
    stop(watches, silent=(1,))
    assert ranks[0].heard
    assert all("rank 1 on" in words for rank in ranks for words, _ in rank.heard)


def test_ranks_that_cannot_be_told_apart_are_all_named() -> None:
    ranks, watches = start(dist.HashStore(), [at(40), at(40)])
    wait(10 * SECONDS, ranks, [0, 1])
    stop(watches)
    assert re.match(r"ranks 0 on \S+, 1 on \S+ stand still in encoder step 9", ranks[0].heard[0][0])


def test_nobody_is_blamed_while_one_rank_moves_or_all_do_what_may_take_long() -> None:
    store = dist.HashStore()
    ranks, watches = start(store, [at(1), at(1)])
    resting, others = start(dist.HashStore(), [at(1, "encoder step 3 (preview or save)", watched=False)] * 2)
    for count in range(2, 20):
        time.sleep(SECONDS / 5)
        ranks[1].heartbeat = at(count)
    assert not any(rank.heard for rank in ranks + resting)
    stop(watches)
    stop(others)


def test_a_rank_that_has_left_is_not_missed() -> None:
    ranks, watches = start(dist.HashStore(), [at(1, watched=False), at(1, watched=False)])
    watches[1].stop()
    time.sleep(3 * SECONDS)
    watches[0].stop()
    assert not ranks[0].heard


class Deaf:
    """A store whose host stands still: after the first look, no call returns."""

    def __init__(self) -> None:
        self.store, self.calls = dist.HashStore(), 0

    def __getattr__(self, name: str) -> object:
        self.calls += 1
        if self.calls > 8:
            time.sleep(20 * SECONDS)
        return getattr(self.store, name)


def test_a_store_that_does_not_answer_ends_the_rank_too() -> None:
    ranks, watches = start(Deaf(), [at(1)])  # type: ignore[arg-type]
    wait(10 * SECONDS, ranks, [0])
    watches[0].done.set()
    assert "the store of the group has not answered" in ranks[0].heard[0][0]
    assert ranks[0].heard[0][1]


def test_time_in_which_the_process_was_suspended_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 1001.0, 1002.0, 1003.0])
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(clock))
    idle = IdleTimer(1.0)
    seen = []
    for moving in (False, False, False, True):
        idle.tick(moving=moving)
        seen.append(idle.seconds)
    assert seen == [1.0, 3.0, 4.0, 0.0]


def test_beats_count_up_and_say_where() -> None:
    before = watchdog._heartbeat.count
    watchdog.heartbeat("encoder", 9, "forward")
    assert watchdog._heartbeat == Heartbeat(before + 1, "encoder step 9 (forward)", watched=True)
    watchdog.suspend("encoder", 9, "preview or save")
    assert watchdog._heartbeat == Heartbeat(before + 2, "encoder step 9 (preview or save)")


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("number", [0, 1])
def test_a_stopped_rank_ends_the_job_which_resumes(number: int, tmp_path: Path, tiny: list[str]) -> None:
    from test_ranks import alive, begin, finish, ranks_of, wait_for

    run, seconds = tmp_path / "run", 5.0
    words = [*tiny, "launcher=processes", "launcher.ranks=2", f"launcher.hang_seconds={seconds}"]
    long = "train_encoder.steps=300"
    process = begin(words, run, long)
    wait_for(process, run, 9)
    ranks = ranks_of(process.pid)
    time.sleep(2 * seconds / watchdog.POLLS)  # until each rank has said where it is since its first step
    os.kill(ranks[number], signal.SIGSTOP)
    assert process.wait(timeout=1.5 * seconds + 10 + 5) == 1  # 5 more, for a machine that does other things
    assert not any(alive(rank) for rank in ranks)
    lines = (tmp_path / "out.txt").read_text().splitlines()
    assert re.match(rf"dvae: error: rank {number} on \S+ stands still in encoder step \d+ \(.*\) for 5 s", lines[-1])
    assert sum("dvae: error" in line for line in lines) == 1
    assert any("dvae/training/loop.py" in line and "in train" in line for line in lines)  # where it stood
    finish(words, run, long)


@pytest.mark.slow
@pytest.mark.alone
def test_under_torchrun_one_rank_says_it(tmp_path: Path, tiny: list[str]) -> None:
    from test_ranks import wait_for

    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = [str(ROOT / "tools" / "launch.py"), *tiny, "launcher.hang_seconds=3", "train_encoder.steps=400"]
    with (tmp_path / "out.txt").open("w") as out:
        process = subprocess.Popen(
            [*torchrun, *words, f"run={run}"], env=environment(), stdout=out, stderr=out, text=True
        )
    wait_for(process, run, 9)
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(max(map(int, found.stdout.split())), signal.SIGSTOP)
    assert process.wait(timeout=90) == 1
    said = [line for line in (tmp_path / "out.txt").read_text().splitlines() if line.startswith("dvae: error")]
    assert len(said) == 1
    assert "stands still in encoder step" in said[0]
