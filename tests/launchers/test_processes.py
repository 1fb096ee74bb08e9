"""The launcher of several processes: its settings, and the one line that says why a job ended."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest
from made_up_ranks import deaf, fails, hangs, stands_still
from tests_support import dry_run

from dvae.config import compose as configuration
from dvae.errors import UserError
from dvae.launchers import processes
from dvae.runs.exit_status import HANGS, RankExit
from dvae.runs.folder import submit
from dvae.utils import machine
from dvae.utils.child_processes import ChildGroup


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launcher.ranks=2"], "unknown field 'launcher.ranks'"),
        (["launcher=processes", "launcher.ranks=0"], "launcher.ranks=0: use 1 or more"),
        (["launcher=proceses"], "did you mean 'processes'"),
    ],
)
def test_a_wrong_launcher_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        configuration.to_run_config(configuration.compose("train", ["recipe=demo", *words]))


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_started(tiny: list[str]) -> None:
    words = [*tiny, "launcher=processes", "launcher.ranks=3", "dry_run=true"]
    with pytest.raises(UserError, match="batch 8 does not divide into 3 ranks x 1 micro-batches: use 6 or 9"):
        dry_run(configuration.compose("train", words))


def test_the_launcher_may_change_between_attempts(tiny: list[str], tmp_path: Path) -> None:
    words = [*tiny, f"run={tmp_path / 'run'}"]
    submit(configuration.compose("train", words))
    run = submit(configuration.compose("train", [*words, "launcher=processes"]))
    assert run.config().launcher.ranks == 2


def test_what_is_left_of_a_failed_job_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.5)
    with ChildGroup() as ranks:
        children = [ranks.start_function(number, work) for number, work in enumerate((deaf, fails))]
        assert processes.wait_for_ranks(ranks) == [RankExit(number=1, status=2, message="lr=0: use more")]
    assert [child.status for child in children] == [-signal.SIGKILL, 2]


def test_a_rank_that_hangs_prints_where_before_it_is_killed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.0)
    with ChildGroup() as ranks:
        stopped = ranks.start_function(0, stands_still)
        while not list(stopped.receive()):
            time.sleep(0.02)
        ranks.start_function(1, hangs)
        stopped.send_signal(signal.SIGSTOP)
        assert processes.wait_for_ranks(ranks) == [RankExit(number=1, status=HANGS, message="rank 0 stands still")]
    assert stopped.status == -signal.SIGQUIT
    assert "in stands_still" in capfd.readouterr().err


def test_each_rank_gets_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(machine, "cores", lambda: 8)
    started: list[dict[str, str]] = []
    monkeypatch.setattr(SpawnProcess, "start", lambda self: started.append(dict(os.environ)))
    for number in range(3):
        processes.start_rank(ChildGroup(), Path("run"), number, 3, 1234)
    assert [(e["RANK"], e["WORLD_SIZE"], e["OMP_NUM_THREADS"]) for e in started] == [
        (str(n), "3", "2") for n in range(3)
    ]
    assert "RANK" not in os.environ
