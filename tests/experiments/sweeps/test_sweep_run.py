"""tools/sweep.py with real trials: killed in the middle, and started again."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tests_support import ROOT, Tool, environment

SWEEP = {
    "program": "tools/launch.py",
    "method": "bayes",
    "metric": {"name": "refiner/loss", "goal": "minimize"},
    "parameters": {
        "train_refiner.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1},
        "denoiser.prediction": {"values": ["eps", "v"]},
    },
    "command": ["${env}", "${interpreter}", "${program}", "run=x/${oc.env:WANDB_RUN_ID}", "${args_no_hyphens}"],
}
COUNT, PARALLEL = 6, 2


def states(out: Path) -> list[str]:
    path = out / "trials.json"
    return [trial["state"] for trial in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again_it_ends_with_all_trials(
    tiny: list[str], tool: Tool, tmp_path: Path
) -> None:
    """SIGKILL once a trial has finished and another has taken a step: both of those that ran are taken up again."""
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(SWEEP), encoding="utf-8")
    words = ["sweep=mine.yaml", f"n={COUNT}", f"parallel={PARALLEL}", "out=out", *tiny]
    out = tmp_path / "out"

    def running_and_at_work() -> bool:
        folders = [out / f"trial-{n:04d}" for n, state in enumerate(states(out), start=1) if state == "running"]
        return "finished" in states(out) and any((folder / "metrics.jsonl").exists() for folder in folders)

    command = [sys.executable, str(ROOT / "tools" / "sweep.py"), *words]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL) as sweep:
        deadline = time.monotonic() + 300
        while not running_and_at_work():
            assert sweep.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(sweep.pid, signal.SIGKILL)
    before = states(out)
    assert before.count("running") in (1, PARALLEL)
    assert len(before) < COUNT

    done = tool("sweep", *words)
    assert done.returncode == 0, done.stderr
    assert states(out) == ["finished"] * COUNT
    again = [f"trial-{n:04d}" for n, state in enumerate(before, start=1) if state == "running"]
    started = [line.split()[1] for line in done.stdout.splitlines() if "train_refiner.lr=" in line]
    assert started[: len(again)] == again
    assert len(started) == COUNT - before.count("finished")

    with (out / "trials.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["refiner/loss"]) for row in rows]
    assert losses == sorted(losses)
    for row in rows:
        run = out / row["trial"]
        config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
        assert config["train_refiner"]["lr"] == float(row["train_refiner.lr"])
        assert config["denoiser"]["prediction"] == row["denoiser.prediction"]
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        assert [r["step"] for r in steps if r["stage"] == "refiner"] == [1, 2, 3, 4, 5, 6]
        assert float(row["refiner/loss"]) == steps[-1]["loss"]
    with Image.open(out / "parallel.png") as image:
        assert np.asarray(image.convert("L")).std() > 10
    assert f"{COUNT} of {COUNT} trials finished" in done.stdout

    once_more = tool("sweep", *words)
    assert once_more.returncode == 0, once_more.stderr
    assert "train_refiner.lr=" not in once_more.stdout
    fewer = tool("sweep", *[word.replace(f"n={COUNT}", "n=2") for word in words])
    assert fewer.returncode == 2
    assert fewer.stderr.startswith("dvae: error: n=2: out holds 6 finished trials already: use n=6 or more")
