"""Two processes that are started as a user starts them: the same losses as one process, resumed, ended together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests_support import ROOT, environment

TIMING = {"time", "seconds", "images_per_second"}
EXACT = [
    f"train_{stage}.{word}"
    for stage in ("encoder", "refiner")
    for word in ("precision=fp32", "preview_every=0", "save_every=3")
]
"""Arithmetic in which the order of summation is all that may differ."""
TWO = ["launcher=processes", "launcher.count=2"]
GONE_WITHIN = 10.0
"""Seconds in which all ranks are gone once one has failed, as docs/reliability.md promises."""


def command(words: list[str], run: Path) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "launch.py"), *words, *EXACT, f"run={run}"]


def finish(words: list[str], run: Path) -> Path:
    """Run to the end."""
    done = subprocess.run(command(words, run), env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return run


def begin(words: list[str], run: Path) -> subprocess.Popen[str]:
    """Start in a session of its own, so that whoever is left of it can be found."""
    out = (run.parent / "out.txt").open("w")
    return subprocess.Popen(
        command(words, run), env=environment(), stdout=out, stderr=out, text=True, start_new_session=True
    )


def rows(run: Path) -> list[dict[str, float]]:
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in text.splitlines()]


def wait_for(process: subprocess.Popen[str], run: Path, count: int) -> None:
    """Return once there are `count` rows of metrics."""
    while len(rows(run)) < count:
        assert process.poll() is None, (run.parent / "out.txt").read_text()
        time.sleep(0.01)


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the launcher's ranks, in their order."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words, stat = (entry / "cmdline").read_text(), (entry / "stat").read_text()
            except OSError:  # it has just ended
                continue
            if int(stat.rpartition(")")[2].split()[1]) == launcher and "spawn_main" in words:
                found.append(int(entry.name))
    return sorted(found)


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def same_weights(one: Path, other: Path) -> bool:
    ours, theirs = (load_file(run / "bundle" / "model.safetensors") for run in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """One process that takes each batch in two parts."""
    halves = ["train_encoder.micro_batches=2", "train_refiner.micro_batches=2"]
    return finish([*tiny, *halves], tmp_path_factory.mktemp("one") / "run")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """Two processes, ZeRO 2."""
    return finish([*tiny, *TWO, *zero(2)], tmp_path_factory.mktemp("two") / "run")


def zero(stage: int) -> list[str]:
    return [f"train_encoder.zero_stage={stage}", f"train_refiner.zero_stage={stage}"]


def agree(one: Path, other: Path) -> None:
    ours, theirs = rows(one), rows(other)
    assert [(r["stage"], r["step"]) for r in ours] == [(s, i) for s in ("encoder", "refiner") for i in range(1, 7)]
    assert [(r["stage"], r["step"]) for r in theirs] == [(r["stage"], r["step"]) for r in ours]
    for mine, its in zip(ours, theirs, strict=True):
        assert its.keys() == mine.keys()
        assert its["loss"] == pytest.approx(mine["loss"], rel=1e-3)
    # the encoder's first step: from then on the weights differ by rounding, which Adam's first steps blow up
    assert theirs[0]["grad_norm"] == pytest.approx(ours[0]["grad_norm"], rel=1e-5)
    assert theirs[0]["loss"] == pytest.approx(ours[0]["loss"], rel=1e-6)
    refiner = [next(r for r in side if r["stage"] == "refiner") for side in (ours, theirs)]
    assert refiner[1]["grad_norm"] == pytest.approx(refiner[0]["grad_norm"], rel=1e-3)
    assert (other / "bundle" / "model.safetensors").exists()
    assert not list(other.rglob(".*.tmp*"))


def test_two_ranks_log_what_one_does(one: Path, two: Path) -> None:
    agree(one, two)


@pytest.mark.parametrize("stage", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_two_ranks_at_the_other_zero_stages_too(one: Path, stage: int, tmp_path: Path, tiny: list[str]) -> None:
    agree(one, finish([*tiny, *TWO, *zero(stage)], tmp_path / "run"))
