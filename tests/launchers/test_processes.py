"""The launcher of several processes: its settings, and the one line that says why a job ended."""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dvae import config as configuration
from dvae import preflight
from dvae.errors import MachineError, UserError
from dvae.launchers import processes
from dvae.run import submit


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["launcher.count=2"], "launcher=local starts none: use launcher=processes"),
        (["launcher=processes", "launcher.count=0"], "launcher.count=0: use 1 or more"),
        (["launcher=proceses"], "did you mean 'processes'"),
    ],
)
def test_a_wrong_launcher_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        configuration.typed(configuration.compose("train", ["recipe=demo", *words]))


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_started(tiny: list[str]) -> None:
    words = [*tiny, "launcher=processes", "launcher.count=3", "dry_run=true"]
    with pytest.raises(UserError, match="batch 8 does not divide into 3 ranks x 1 micro-batches: use 6 or 9"):
        preflight.describe(configuration.compose("train", words))


def test_the_launcher_may_change_between_attempts(tiny: list[str], tmp_path: Path) -> None:
    words = [*tiny, f"run={tmp_path / 'run'}"]
    submit(configuration.compose("train", words))
    run = submit(configuration.compose("train", [*words, "launcher=processes"]))
    assert run.config().launcher.count == 2


def failed(number: int, status: int, said: str = "") -> Any:
    return SimpleNamespace(number=number, process=SimpleNamespace(exitcode=status), said=said)


def test_the_cause_is_named_and_not_who_lost_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"stage": "encoder", "step": 12}\n{"stage": "enc')
    lost = failed(0, processes.LOST, "rank 0: lost the connection to another rank")
    for other, line in (
        (failed(1, -9), "rank 1 ended by SIGKILL after encoder step 12; the other ranks were stopped: the same"),
        (failed(1, 1, "disk full"), "rank 1 failed with exit status 1 after encoder step 12: disk full"),
    ):
        with pytest.raises(MachineError, match=line):
            processes.explain(tmp_path, [lost, other], [])
    with pytest.raises(UserError, match=r"^mend this$"):
        processes.explain(tmp_path, [lost, failed(1, 2, "mend this")], [])
    with pytest.raises(MachineError, match="ended by SIGTERM") as caught:
        processes.explain(tmp_path, [failed(0, -15), failed(1, -15)], [signal.SIGTERM])
    assert caught.value.exit_status == 143
    with pytest.raises(KeyboardInterrupt):
        processes.explain(tmp_path, [failed(0, 130)], [signal.SIGINT])
    assert processes.last_step(tmp_path / "empty") == "no step on record"


def deaf() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def test_what_is_left_of_a_failed_job_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.5)
    ranks = []
    for number, work in enumerate((deaf, sys.exit)):
        line, _ = get_context("spawn").Pipe(duplex=False)
        process = get_context("spawn").Process(target=work, args=() if work is deaf else (3,))
        process.start()
        ranks.append(processes.Rank(number, process, line))
    assert [rank.number for rank in processes.watch(ranks)] == [1]
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
