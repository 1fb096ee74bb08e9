"""Trials as real processes: their share of the machine, their logs, and that none outlives the sweep."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import pytest

from dvae.experiments.sweeps.trial_processes import TrialProcesses, machine_share
from dvae.utils.machine import cores


@pytest.mark.parametrize(
    ("slot", "parallel", "devices", "visible"),
    [
        (0, 2, ["0", "1", "2", "3"], "0,2"),
        (1, 2, ["0", "1", "2", "3"], "1,3"),
        (1, 2, ["GPU-a"], "GPU-a"),
        (4, 5, ["0", "1", "2"], "1"),
    ],
)
def test_gpus_are_dealt_out(slot: int, parallel: int, devices: list[str], visible: str) -> None:
    assert machine_share(slot, parallel, {}, devices)["CUDA_VISIBLE_DEVICES"] == visible


def test_every_gpu_is_somebodys() -> None:
    dealt = [machine_share(slot, 3, {}, [str(n) for n in range(8)])["CUDA_VISIBLE_DEVICES"] for slot in range(3)]
    assert sorted(",".join(dealt).split(","), key=int) == [str(n) for n in range(8)]


def test_cores_are_shared_unless_the_user_has_said_how_many() -> None:
    assert machine_share(0, 1, {}, []) == {"OMP_NUM_THREADS": cores()}
    assert machine_share(0, 1000, {}, []) == {"OMP_NUM_THREADS": 1}
    assert machine_share(0, 2, {"OMP_NUM_THREADS": "3"}, []) == {}


def wait_for(processes: TrialProcesses) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        for running in processes.ended().values():
            return running.process.status
        time.sleep(0.02)
    raise AssertionError("did not end")


def test_what_a_trial_says_is_added_to_its_log(tmp_path: Path) -> None:
    log = tmp_path / "trial-0001.log"
    processes = TrialProcesses(2)
    for word in ("first", "second"):
        processes.start(1, [sys.executable, "-c", f"import sys; print('{word}'); sys.exit('50%\\r{word}: no\\n')"], log)
        running = processes.running[1]
        assert wait_for(processes) == 1
        assert running.last_line() == f"{word}: no"
    assert log.read_text(encoding="utf-8").count("first") == 2
    assert processes.running == {}


def test_slots_are_given_again(tmp_path: Path) -> None:
    processes = TrialProcesses(2)
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    processes.start(1, sleeping, tmp_path / "1")
    processes.start(2, [sys.executable, "-c", ""], tmp_path / "2")
    assert [running.slot for running in processes.running.values()] == [0, 1]
    assert wait_for(processes) == 0
    processes.start(3, sleeping, tmp_path / "3")
    assert processes.running[3].slot == 1
    gone = list(processes.running.values())
    processes.stop_all()
    assert [running.process.status for running in gone] == [-signal.SIGTERM] * 2
