"""The launcher of several processes: its settings, and the one line that says why a job ended."""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from dvae.config import compose as configuration
from dvae.config import validate
from dvae.errors import UserError
from dvae.launchers import processes
from dvae.runs.exit_status import RankExit
from dvae.runs.folder import submit


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
        configuration.typed(configuration.compose("train", ["recipe=demo", *words]))


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_started(tiny: list[str]) -> None:
    words = [*tiny, "launcher=processes", "launcher.ranks=3", "dry_run=true"]
    with pytest.raises(UserError, match="batch 8 does not divide into 3 ranks x 1 micro-batches: use 6 or 9"):
        validate.describe(configuration.compose("train", words))


def test_the_launcher_may_change_between_attempts(tiny: list[str], tmp_path: Path) -> None:
    words = [*tiny, f"run={tmp_path / 'run'}"]
    submit(configuration.compose("train", words))
    run = submit(configuration.compose("train", [*words, "launcher=processes"]))
    assert run.config().launcher.ranks == 2


def deaf() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def fails() -> None:
    sys.exit(
        3
    )  # in a function of ours: W&B's client, if another test has used it, puts its own in the place of sys.exit


def test_what_is_left_of_a_failed_job_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.5)
    ranks = []
    for number, work in enumerate((deaf, fails)):
        line, _ = get_context("spawn").Pipe(duplex=False)
        process = get_context("spawn").Process(target=work)
        process.start()
        ranks.append(processes.RankProcess(number, process, line))
    assert processes.watch(ranks) == [RankExit(number=1, status=3)]
    assert [rank.process.exitcode for rank in ranks] == [-signal.SIGKILL, 3]


def test_each_rank_gets_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(processes, "cores", lambda: 8)
    started: list[dict[str, str]] = []
    monkeypatch.setattr(processes.SpawnProcess, "start", lambda self: started.append(dict(os.environ)))
    for number in range(3):
        processes.start(Path("run"), number, 3, 1234)
    assert [(e["RANK"], e["WORLD_SIZE"], e["OMP_NUM_THREADS"]) for e in started] == [
        (str(n), "3", "2") for n in range(3)
    ]
    assert "RANK" not in os.environ
