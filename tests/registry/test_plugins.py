"""A component in one file: as a module, and as an installed third-party package whose schedule trains."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests_support import ROOT, environment

SHORT_BRIGHTNESS = ["train_brightness.steps=60", "train_brightness.batch=8", "train_brightness.log_every=1",
                    "train_brightness.lr=0.05", "train_brightness.warmup=1"]  # fmt: skip


def launch(*words: str, path: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """tools/launch.py in a fresh interpreter, with `path` first on PYTHONPATH."""
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / "launch.py"), *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def rows_of(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics of a run that are complete so far."""
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def examples() -> dict[str, str]:
    """The whole examples in CONTRIBUTING.md, by the file name that the text gives each."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return dict(re.findall(r"`(my_\w+\.py)`:\n\n```python\n(.*?)```", text, re.DOTALL))


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A working folder with the examples of CONTRIBUTING.md in it, and nothing else."""
    for name, code in examples().items():
        (tmp_path / name).write_text(code)
    return tmp_path


@pytest.mark.slow
def test_the_schedule_of_contributing_trains_from_the_working_folder(mine: Path, tiny: list[str]) -> None:
    words = [*tiny, "plugins=[my_schedule]", "schedule=constant_rate", "schedule.beta=10", "run=run"]
    done = launch(*words, path=ROOT, cwd=mine)
    assert done.returncode == 0, done.stderr
    assert "name: constant_rate\n  beta: 10" in (mine / "run" / "config.yaml").read_text()


@pytest.mark.slow
def test_the_stage_of_contributing_trains_from_the_working_folder(mine: Path, tiny: list[str]) -> None:
    words = [*tiny, "plugins=[my_stage]", "stages=[shards,encoder,brightness]", "run=run", *SHORT_BRIGHTNESS]
    done = launch(*words, path=ROOT, cwd=mine)
    assert done.returncode == 0, done.stderr
    rows = [row for row in rows_of(mine / "run") if row["stage"] == "brightness"]
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]
    assert {"brightness", "encoder"} <= json.loads((mine / "run" / "stages.json").read_text()).keys()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample package, pip-installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(ROOT / "tests" / "plugins", folder / "source")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--target", str(folder / "site")]
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(folder / "source")], check=True)
    return folder / "site"


@pytest.mark.slow
def test_an_installed_plugin_trains(installed: Path, tmp_path: Path, tiny: list[str]) -> None:
    words = [*tiny, "schedule=sigmoid_sample", "schedule.end=4"]
    done = launch(*words, f"run={tmp_path}/run", path=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    about = (tmp_path / "run" / "bundle" / "bundle.json").read_text()
    assert '"package": "dvae_sample_plugin"' in about
    assert '"version": "1.2.3"' in about


PROBED = [
    "stages=[shards,encoder,probe]", "train_probe.steps=400", "train_probe.batch=8", "train_probe.save_every=20",
    "train_probe.log_every=1", "train_probe.warmup=1", "train_probe.preview_every=0", "probe.power=0.5",
]  # fmt: skip
"""Overrides for a run with the stage of the sample package."""


def test_the_stage_of_an_installed_package_appears(installed: Path, tmp_path: Path, tiny: list[str]) -> None:
    """In the help, in the list of components, and in a dry run, which refuses wrong settings of it."""
    listed = launch("--help", path=installed, cwd=tmp_path).stdout
    assert "\n  stage probe\n" in listed
    assert "\n  schedule sigmoid_sample\n" in listed
    told = launch(*tiny, *PROBED, "dry_run=true", path=installed, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert "stages: shards -> encoder -> probe\n" in told.stdout
    assert "probe: 400 steps of 8 images; to do" in told.stdout
    assert "probe:\n  power: 0.5" in told.stdout
    for word, said in (("probe.power=0", "probe.power=0: use more than 0"), ("probe.powr=1", "did you mean 'power'?")):
        wrong = launch(*tiny, *PROBED, word, "dry_run=true", path=installed, cwd=tmp_path)
        assert wrong.returncode == 2
        assert said in wrong.stderr
        assert len(wrong.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_stage_of_an_installed_package_resumes_after_a_kill(
    installed: Path, tmp_path: Path, tiny: list[str]
) -> None:
    words = [*tiny, *PROBED]
    whole = launch(*words, "run=whole", path=installed, cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, str(ROOT / "tools" / "launch.py"), *words, "run=killed"]
    path = environment(PYTHONPATH=f"{installed}{os.pathsep}{ROOT}")
    with subprocess.Popen(command, cwd=tmp_path, env=path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None and sum(row["stage"] == "probe" for row in rows_of(tmp_path / "killed")) < 50:
            time.sleep(0.01)
        run.kill()
    assert run.returncode == -signal.SIGKILL
    told = launch(*words, "run=killed", "dry_run=true", path=installed, cwd=tmp_path)
    assert re.search(r"probe: 400 steps of 8 images; begun, resumes .* checkpoint of probe at step \d+", told.stdout)
    assert "encoder: 0.0M parameters, 6 steps of 8 images; finished" in told.stdout
    again = launch(*words, "run=killed", path=installed, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    ours, theirs = (load_file(tmp_path / name / "weights" / "probe.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    steps = [row["step"] for row in rows_of(tmp_path / "killed") if row["stage"] == "probe"]
    assert steps == list(range(1, 401))


@pytest.mark.slow
def test_runs_outlive_the_coming_and_going_of_a_package(installed: Path, tmp_path: Path, tiny: list[str]) -> None:
    """A run that has not its stage is taken up with the package and without; one that has it says what is missing."""
    short = [*tiny, "stages=[shards,encoder]", "run=run"]
    for path in (ROOT, installed, ROOT):
        done = launch(*short, path=path, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    changed = launch(*short, "train_encoder.steps=7", path=installed, cwd=tmp_path)
    assert "was made with train_encoder.steps=6, now 7" in changed.stderr
    with_probe = [
        *short,
        "stages=[shards,encoder,probe]",
        *PROBED[1:],
        "train_probe.steps=2",
        "train_probe.log_every=1",
    ]
    assert "train_probe" not in (tmp_path / "run" / "config.yaml").read_text()
    done = launch(*with_probe, path=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    without = launch(*short, path=ROOT, cwd=tmp_path)
    assert without.returncode == 2
    assert "has the setting 'probe' of" in without.stderr or "which no stage here knows: install the" in without.stderr
    changed = launch(*with_probe, "probe.power=2", path=installed, cwd=tmp_path)
    assert "was made with probe.power=0.5, now 2.0" in changed.stderr
    missing = launch(*tiny, *PROBED, "run=other", path=ROOT, cwd=tmp_path)
    assert missing.returncode == 2
    assert "unknown field 'train_probe" in missing.stderr or "unknown stage 'probe'" in missing.stderr


@pytest.mark.slow
def test_the_recipes_of_an_installed_package(installed: Path, tmp_path: Path, tiny: list[str]) -> None:
    words = ["recipe=sample_demo", *tiny[1:], "run=run", "stages=[shards,encoder]"]
    done = launch(*words, path=installed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "recipe: sample_demo" in config
    assert "name: sigmoid_sample" in config
    assert "sample_demo" in launch("--help", path=installed, cwd=tmp_path).stdout
    wrong = launch("recipe=sample_dem", "dry_run=true", path=installed, cwd=tmp_path)
    assert "did you mean 'sample_demo'?" in wrong.stderr


def test_a_package_may_not_replace_a_recipe(installed: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    shutil.copyfile(ROOT / "recipes/recipe/demo.yaml", site / "dvae_sample_plugin" / "recipes" / "recipe" / "demo.yaml")
    done = launch("recipe=sample_demo", "dry_run=true", path=site, cwd=tmp_path)
    assert done.returncode == 2
    assert "its recipes/recipe/demo.yaml has the name of" in done.stderr
    assert launch("recipe=demo", "dry_run=true", path=site, cwd=tmp_path).returncode == 0


def test_a_broken_plugin_breaks_nothing_and_is_named_where_a_name_is_not_found(installed: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(installed, site)
    (site / "dvae_sample_plugin" / "__init__.py").write_text("raise RuntimeError('no such luck')\n")
    fine = launch("recipe=demo", "dry_run=true", path=site, cwd=tmp_path)
    assert fine.returncode == 0, fine.stderr
    missing = launch("recipe=demo", "dry_run=true", "schedule=sigmoid_sample", path=site, cwd=tmp_path)
    assert missing.returncode == 2
    assert "sample (dvae_sample_plugin): RuntimeError: no such luck" in missing.stderr
    assert len(missing.stderr.strip().splitlines()) == 1


def test_components_lists_name_summary_fields_and_package(installed: Path, tmp_path: Path) -> None:
    def listed(*words: str) -> str:
        command = [sys.executable, str(ROOT / "tools" / "components.py"), *words]
        path = os.environ | {"PYTHONPATH": f"{installed}{os.pathsep}{ROOT}", "COLUMNS": "150"}
        done = subprocess.run(command, env=path, capture_output=True, text=True, check=True)
        return " ".join(done.stdout.split())

    schedules = listed("schedule")
    assert re.search(r"sigmoid_sample abar\(t\) falls along a sigmoid.*?\[dvae_sample_plugin 1\.2\.3\]", schedules)
    assert re.search(r"cosine .*?\[dvae [0-9.]+\]", schedules)
    assert "schedule.start=-3.0 Argument of the sigmoid at t = 0. (float)" in listed("schedule", "sigmoid_sample")
    stage = listed("stage", "probe")
    assert "probe.power=1.0 The mean of the pixels to this power. (float)" in stage
    assert "train_probe.steps=100000 Optimizer steps." in stage
