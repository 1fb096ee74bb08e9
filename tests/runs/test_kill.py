"""kill -9 in every stage, then the same command: it resumes and finishes as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
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


def words_for(tiny: list[str], run: Path) -> list[str]:
    longer = [f"{stage}.steps=40" for stage in ("train_encoder", "train_refiner")]
    saves = [f"{stage}.save_every=7" for stage in ("train_encoder", "train_refiner")]
    return [sys.executable, str(ROOT / "tools" / "launch.py"), *tiny, *longer, *saves, "evaluate.n=64", f"run={run}"]


def rows(run: Path) -> list[dict[str, object]]:
    text = (run / "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in text.splitlines()]


def wait_for(process: subprocess.Popen[str], run: Path, stage: str, fraction: float) -> None:
    """Return once `stage` is under way, by about `fraction` of it."""
    target = {"encoder": round(40 * fraction), "refiner": round(40 * fraction)}.get(stage, 0)
    while process.poll() is None:
        if stage in ("encoder", "refiner"):
            lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
            if sum(f'"stage": "{stage}"' in line for line in lines) >= target:
                return
        elif f"dvae: {stage} ..." in (run.parent / "out.txt").read_text():
            time.sleep(0.5 * fraction)
            return
        time.sleep(0.01)
    raise AssertionError(f"the run ended before {stage} could be killed")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """The same run, never disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run(words_for(tiny, folder / "run"), env=environment(), check=True, capture_output=True, timeout=600)
    return folder / "run"


@pytest.mark.slow
def test_a_run_killed_in_every_stage_ends_as_an_undisturbed_one(whole: Path, tmp_path: Path, tiny: list[str]) -> None:
    run, chance = tmp_path / "run", random.Random(0)
    for stage in ("shards", "encoder", "encoder", "prior", "refiner", "refiner", "evaluate"):
        with (tmp_path / "out.txt").open("w") as out:
            process = subprocess.Popen(words_for(tiny, run), env=environment(), stdout=out, stderr=out, text=True)
            wait_for(process, run, stage, chance.random())
            process.send_signal(signal.SIGKILL)
            process.wait()
    done = subprocess.run(words_for(tiny, run), env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert rows(run) == rows(whole)
    assert [(r["stage"], r["step"]) for r in rows(run)] == [
        (s, i) for s in ("encoder", "refiner") for i in range(1, 41)
    ]
    ours, theirs = (load_file(folder / "bundle" / "model.safetensors") for folder in (run, whole))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    assert (run / "samples.png").read_bytes() == (whole / "samples.png").read_bytes()
    assert not list(run.rglob(".*.tmp*"))


def trained(folder: Path, tiny: list[str], shards: Path, ranks: int, steps: int, kills: int) -> dict[str, int]:
    """Encoder and refiner of so many steps, saved at every third, killed so often; what tests/killed_runs.py says."""
    words = [*tiny, "stages=[encoder,refiner]", f"data.shards={shards}", f"run={folder / 'run'}"]
    for stage in ("train_encoder", "train_refiner"):
        words += [
            f"{stage}.steps={steps}",
            f"{stage}.save_every=3",
            f"{stage}.preview_every=0",
            f"{stage}.zero_stage=2",
        ]
    task = {"words": words, "run": str(folder / "run"), "ranks": ranks, "kills": kills, "seed": kills}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "killed_runs.py"), json.dumps(task)],
        env=environment(), capture_output=True, text=True, timeout=3000,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def files_of(run: Path, steps: int) -> dict[str, bytes]:
    """All that was trained, byte for byte: averages, and the last checkpoints with weights and moments."""
    found = [*run.glob("weights/*.safetensors"), *run.glob(f"checkpoints/*/step-{steps:08d}/**/*.safetensors")]
    return {str(path.relative_to(run)): path.read_bytes() for path in found}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_killed_at_random_moments_ends_as_an_undisturbed_one(
    whole: Path, ranks: int, tmp_path: Path, tiny: list[str]
) -> None:
    kills = int(os.environ.get("DVAE_KILLS", "20"))
    steps = max(150, 6 * kills)  # an attempt gets no further than about 10
    for name, count in (("undisturbed", 0), ("killed", kills)):
        (tmp_path / name).mkdir()
        print(trained(tmp_path / name, tiny, whole / "shards", ranks, steps, count))
    undisturbed, killed = tmp_path / "undisturbed" / "run", tmp_path / "killed" / "run"
    assert rows(killed) == rows(undisturbed)
    assert len(rows(killed)) == 2 * steps
    assert len(files_of(killed, steps)) == 3 + 2 * ranks  # encoder, its posteriors, denoiser
    assert files_of(killed, steps) == files_of(undisturbed, steps)
    assert not list(killed.rglob(".*.tmp*"))


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(whole: Path, tmp_path: Path, tiny: list[str]) -> None:
    run = tmp_path / "run"
    with (tmp_path / "out.txt").open("w") as out:
        process = subprocess.Popen(words_for(tiny, run), env=environment(), stdout=out, stderr=out, text=True)
        wait_for(process, run, "refiner", 0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143
    assert "saved: the same command again resumes" in (tmp_path / "out.txt").read_text()
    done = subprocess.run(words_for(tiny, run), env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert rows(run) == rows(whole)
