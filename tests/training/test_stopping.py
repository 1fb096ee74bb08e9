"""StopRequest on request: each signal and the time limit are kept and named, a second signal ends at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests_support import ROOT, environment

from dvae.config import compose as configuration
from dvae.errors import UserError
from dvae.training.resilience import stopping
from dvae.training.resilience.stopping import SIGNALS, Stopped, StopRequest


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_kept_and_named_and_handlers_are_put_back(number: signal.Signals) -> None:
    request, before = StopRequest(), signal.getsignal(number)
    with request.handle_signals():
        assert request.reason_of_any_rank() == ""
        os.kill(os.getpid(), number)
        assert request.reason_of_any_rank() == number.name
    assert signal.getsignal(number) == before
    with pytest.raises(Stopped, match=number.name) as caught:  # in the last step of a stage: the next does not begin
        request.raise_between_stages()
    assert caught.value.exit_status == 143


@pytest.mark.parametrize(("first", "second"), [(signal.SIGUSR1, signal.SIGTERM), (signal.SIGTERM, signal.SIGUSR2)])
def test_a_second_signal_of_any_kind_ends_at_once(first: signal.Signals, second: signal.Signals) -> None:
    code = (
        "import os, time\nfrom dvae.training.resilience.stopping import StopRequest\n"
        f"with StopRequest().handle_signals():\n    os.kill(os.getpid(), {first:d})\n    print('on', flush=True)\n"
        f"    os.kill(os.getpid(), {second:d})\n    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.stdout == "on\n"
    assert done.returncode == -second


def test_the_time_limit_is_of_this_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    request = stopping.start_attempt(0.5)
    assert stopping.current() is request
    monkeypatch.setattr(stopping, "PROCESS_START", time.monotonic() - 1799)
    assert request.reason_of_any_rank() == ""
    monkeypatch.setattr(stopping, "PROCESS_START", time.monotonic() - 1801)
    assert request.reason_of_any_rank() == "max_hours=0.5"
    assert stopping.start_attempt(0.0).reason_of_any_rank() == ""


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("max_hours=-1", r"max_hours=-1: use 0 \(no limit\) or more"),
        ("launcher.hang_seconds=-5", r"launcher\.hang_seconds=-5: use 0 \(never\) or more"),
        ("train_refiner.nonfinite_skips=-2", r"train_refiner\.nonfinite_skips=-2: use 0 or more"),
    ],
)
def test_a_wrong_setting_is_refused(word: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        configuration.to_run_config(configuration.compose("train", ["recipe=demo", word]))


def launch(words: list[str], run: Path) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "launch.py"), *words, f"run={run}"]


def test_each_attempt_takes_a_step_whatever_its_limit(tmp_path: Path) -> None:
    words = launch(["recipe=toy2d", "max_hours=1e-6"], tmp_path / "run")
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 143
    assert done.stderr.splitlines()[-1] == (
        "dvae: error: stopped at refiner step 1 (max_hours=1e-06), saved: the same command again resumes"
    )
    assert (tmp_path / "run" / "checkpoints" / "refiner" / "step-00000001").exists()


@pytest.mark.slow
@pytest.mark.alone
def test_sigusr1_reaches_all_ranks_and_no_stage_begins_after_the_limit(tmp_path: Path, tiny: list[str]) -> None:
    run = tmp_path / "run"
    words = launch([*tiny, "launcher=processes", "launcher.ranks=2", "train_encoder.steps=4000"], run)
    done = subprocess.run([*words, "max_hours=1e-6"], env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 143
    assert done.stderr.splitlines()[-1] == (
        "dvae: error: stopped after a stage (max_hours=1e-06), saved: the same command again resumes"
    )
    process = subprocess.Popen(words, env=environment(), stderr=subprocess.PIPE, text=True)
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < 5:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert re.search(r"stopped at encoder step \d+ \(SIGUSR1\), saved: the same", stderr.splitlines()[-1])
