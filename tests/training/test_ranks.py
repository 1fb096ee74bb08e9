"""Two processes that are started as a user starts them: the same losses as one process, resumed, ended together."""

from __future__ import annotations

import fcntl
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
from spawned_ranks import on_ranks
from tests_support import ROOT, environment

from dvae.config import compose as configuration
from dvae.data.shards.reader import Shards
from dvae.runs import attempts
from dvae.runs.folder import submit

TIMING = {"time", "seconds", "images_per_second"}
EXACT = [
    f"train_{stage}.{word}"
    for stage in ("encoder", "refiner")
    for word in ("precision=fp32", "steps=20", "preview_every=15", "save_every=6")
]
"""Arithmetic in which the order of summation is all that may differ."""
TWO = ["launcher=processes", "launcher.ranks=2"]
GONE_WITHIN = 10.0
"""Seconds in which all ranks are gone once one has failed, as docs/reliability.md promises."""


def command(words: list[str], run: Path, more: list[str] | None = None) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "launch.py"), *words, *EXACT, *(more or []), f"run={run}"]


def finish(words: list[str], run: Path, *more: str) -> Path:
    """Run to the end."""
    done = subprocess.run(
        command(words, run, list(more)), env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return run


def begin(words: list[str], run: Path, *more: str) -> subprocess.Popen[str]:
    """Start in a session of its own, so that whoever is left of it can be found."""
    out = (run.parent / "out.txt").open("w")
    return subprocess.Popen(
        command(words, run, list(more)), env=environment(), stdout=out, stderr=out, text=True, start_new_session=True
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
    assert [(r["stage"], r["step"]) for r in ours] == [(s, i) for s in ("encoder", "refiner") for i in range(1, 21)]
    assert [(r["stage"], r["step"]) for r in theirs] == [(r["stage"], r["step"]) for r in ours]
    for mine, its in zip(ours, theirs, strict=True):
        assert its.keys() == mine.keys()
        assert its["loss"] == pytest.approx(mine["loss"], rel=1e-3)
        if mine["step"] == 1:
            assert its["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-5)
    assert (other / "bundle" / "model.safetensors").exists()
    assert not list(other.rglob(".*.tmp*"))


def test_two_ranks_log_what_one_does(one: Path, two: Path) -> None:
    agree(one, two)
    assert [(row.launcher, row.count, row.status) for run in (one, two) for row in attempts.read(run)] == [
        ("local", 1, 0),
        ("processes", 2, 0),
    ]


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_two_ranks_at_the_other_zero_stages_too(one: Path, stage: int, tmp_path: Path, tiny: list[str]) -> None:
    agree(one, finish([*tiny, *TWO, *zero(stage)], tmp_path / "run"))


def killed(process: subprocess.Popen[str], run: Path, number: int) -> str:
    """Kill one rank with SIGKILL; returns the launcher's last line. All are gone within the stated time."""
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    began = time.monotonic()
    os.kill(ranks[number], signal.SIGKILL)
    assert process.wait(timeout=GONE_WITHIN) == 1
    assert not any(alive(rank) for rank in ranks)
    assert time.monotonic() - began < GONE_WITHIN
    return (run.parent / "out.txt").read_text().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.alone
def test_a_killed_rank_and_sigterm_leave_no_trace(two: Path, tmp_path: Path, tiny: list[str]) -> None:
    run, words = tmp_path / "run", [*tiny, *TWO, *zero(2)]
    process = begin(words, run)
    wait_for(process, run, 9)
    line = killed(process, run, 1)
    assert line.startswith("dvae: error: rank 1 ended by SIGKILL after encoder step ")

    process = begin(words, run)
    wait_for(process, run, 28)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert "refiner step" in (said := (tmp_path / "out.txt").read_text().splitlines()[-1])
    assert said.endswith("saved: the same command again resumes")

    finish(words, run)
    assert rows(run) == rows(two)
    assert same_weights(run, two)


@pytest.mark.slow
@pytest.mark.alone
def test_a_killed_first_rank_and_a_killed_launcher_leave_no_trace(two: Path, tmp_path: Path, tiny: list[str]) -> None:
    run, words = tmp_path / "run", [*tiny, *TWO, *zero(2)]
    process = begin(words, run)
    wait_for(process, run, 9)
    assert killed(process, run, 0).startswith("dvae: error: rank 0 ended by SIGKILL after encoder step ")
    process = begin(words, run)
    wait_for(process, run, 28)
    ranks = ranks_of(process.pid)
    process.kill()
    process.wait()
    deadline = time.monotonic() + GONE_WITHIN
    while any(alive(rank) for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    finish(words, run)
    assert rows(run) == rows(two)
    assert same_weights(run, two)


@pytest.mark.slow
@pytest.mark.alone
def test_ranks_and_zero_stage_change_in_mid_run(one: Path, tmp_path: Path, tiny: list[str]) -> None:
    """2 ranks at ZeRO 1, one process at ZeRO 3, 2 ranks at ZeRO 2, one process at ZeRO 0."""
    run, words = tmp_path / "run", [*tiny, "data.log_samples=true"]
    for attempt, stop in (([*TWO, *zero(1)], 6), (zero(3), 13), ([*TWO, *zero(2)], 28)):
        process = begin([*words, *attempt], run)
        wait_for(process, run, stop)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    finish([*words, *zero(0)], run)
    agree(one, run)
    count = len(Shards(run / "shards", "train"))
    for stage in ("encoder", "refiner"):
        seen = [json.loads(line) for line in (run / f"samples-{stage}.jsonl").read_text().splitlines()]
        assert [key for row in seen for key in row["samples"]] == list(range(20 * 8))
        indices = [index for row in seen for index in row["indices"]]
        assert sorted(indices[:count]) == list(range(count))
        assert len(set(indices[count:])) == 20 * 8 - count > 0


@pytest.mark.slow
@pytest.mark.alone
def test_torchrun_is_honored(two: Path, tmp_path: Path, tiny: list[str]) -> None:
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = command([*tiny, *zero(2)], run)[1:]
    done = subprocess.run([*torchrun, *words], env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert rows(run) == rows(two)
    assert same_weights(run, two)


@pytest.mark.slow
def test_a_mistake_found_by_a_rank_is_one_line_and_status_2(tmp_path: Path, tiny: list[str]) -> None:
    run = tmp_path / "run"
    submit(configuration.compose("train", command([*tiny, *TWO], run)[2:]))
    with (run / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        done = subprocess.run(command([*tiny, *TWO], run), env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"dvae: error: run={run} is in use by another process: wait for it, or use another run="
    ]


@pytest.mark.slow
def test_all_ranks_refuse_a_non_finite_step(tmp_path: Path, tiny: list[str]) -> None:
    run = tmp_path / "run"
    words = [*command([*tiny, *TWO, *zero(2)], run), "train_encoder.lr=1e30", "train_encoder.save_every=1"]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    assert "a gradient is not finite" in done.stderr.splitlines()[-1]
    assert sum("dvae: error" in line for line in done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    (record,) = run.glob("nonfinite-encoder-*/record.json")
    kept = json.loads(record.read_text())
    step = kept["step"]
    assert sorted(kept["samples"]) == list(range(8 * (step - 1), 8 * step))
    assert len(kept["indices"]) == 8
    saved = sorted((run / "checkpoints" / "encoder").iterdir())
    assert saved[-1].name == f"step-{step - 1:08d}"


def nan_on_one(number: int) -> None:
    """A rank on whose share of the batch alone the loss is not a number."""
    from dvae.config.schema import TrainingConfig
    from dvae.training.engine.deepspeed_engine import Engine

    for stage in range(4):
        engine = Engine(torch.nn.Linear(4, 4), TrainingConfig(batch=4, zero_stage=stage))
        for step, factor in ((1, 1.0), (2, torch.nan if number == 1 else 1.0), (3, 1.0)):
            engine.backward((factor * engine(torch.ones(2, 4))).square().mean())
            before = engine.averaged_weights()
            assert engine.step(step) is (step != 2), (stage, step)
            after = engine.averaged_weights()
            assert all(value.isfinite().all() for value in after.values())
            assert all(torch.equal(after[name], before[name]) for name in after) is (step == 2), (stage, step)


@pytest.mark.slow
def test_a_value_that_is_not_finite_on_one_rank_is_refused_by_both() -> None:
    on_ranks(2, nan_on_one)
