"""Runs as a user makes them: own images, formulations, non-finite steps, a full disk, W&B, a second process."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests_support import Tool


@pytest.fixture
def folder_of_images(tmp_path: Path) -> Path:
    """60 photographs of nothing, of several sizes and formats."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    drawn = np.random.default_rng(0)
    for number in range(60):
        height, width = drawn.integers(20, 50, 2)
        pixels = np.linspace(0, 255, height * width * 3).reshape(height, width, 3) * drawn.random(3)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:03}.{('png', 'jpg', 'webp')[number % 3]}")
    return folder


def without(words: list[str], *prefixes: str) -> list[str]:
    return [word for word in words if not word.startswith(prefixes)]


def test_ones_own_folder_of_images(folder_of_images: Path, tool: Tool, tiny: list[str], tmp_path: Path) -> None:
    words = without(tiny, "source.")
    done = tool("launch", *words, "source=folder", f"source.path={folder_of_images}", "run=mine")
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "mine" / "stages.json").read_text())
    assert records["shards"]["train"] + records["shards"]["heldout"] == 60
    assert (tmp_path / "mine" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize("form", ["none", "input"])
def test_the_formulations_train_with_a_table_and_dropped_conditions(form: str, tool: Tool, tiny: list[str]) -> None:
    words = [f"denoiser.center={form}", "denoiser.prediction=eps", "denoiser.condition_dropout=0.5", "data.flip=true"]
    done = tool("launch", *tiny, *words, "schedule=ddpm_linear", "sampler=ddpm", "sampler.steps=3", "run=mine")
    assert done.returncode == 0, done.stderr


def test_a_non_finite_step_ends_the_run_and_spoils_nothing(tool: Tool, tiny: list[str], tmp_path: Path) -> None:
    done = tool("launch", *tiny, "train_encoder.lr=1e30", "train_encoder.save_every=1", "run=mine")
    assert done.returncode == 1
    assert "a gradient is not finite" in done.stderr.splitlines()[-1]
    (record,) = (tmp_path / "mine").glob("nonfinite-encoder-*/record.json")
    kept = json.loads(record.read_text())
    assert len(kept["samples"]) == len(kept["indices"]) == 8
    saved = sorted((tmp_path / "mine" / "checkpoints" / "encoder").iterdir())
    assert saved[-1].name == f"step-{kept['step'] - 1:08d}"
    assert not (tmp_path / "mine" / "weights").exists()


@pytest.fixture(params=["1m", *(pytest.param(size, marks=pytest.mark.slow) for size in ("2m", "4m"))])
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system that fills up while shards, a checkpoint or the bundle are written."""
    folder = tmp_path / "small"
    folder.mkdir()
    options = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "none", str(folder)]
    mounted = subprocess.run(options, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk needs the right to mount: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_leaves_nothing_half_written(small_disk: Path, tool: Tool, tiny: list[str]) -> None:
    words = ["refiner.width=64", "train_refiner.save_every=1"]
    done = tool("launch", *tiny, *words, f"run={small_disk}/run")
    assert done.returncode == 1, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("dvae: error: ")
    assert "No space left on device" in last or "bytes are free on this disk" in last
    assert not list((small_disk / "run").rglob(".*.tmp*"))


@pytest.mark.slow
def test_wandb_offline_continues_one_run(tool: Tool, tiny: list[str], tmp_path: Path) -> None:
    from dvae.tracking.wandb_run import offline_rows

    words, key = [*tiny, "tracking.wandb.mode=offline", "run=mine"], "0123456789abcdef0123456789abcdef01234567"
    for stages in ("[shards,encoder]", "[shards,encoder,prior,refiner]"):
        done = tool("launch", *words, f"stages={stages}", WANDB_API_KEY=key)
        assert done.returncode == 0, done.stderr
        assert key not in done.stdout + done.stderr
    assert not any(key.encode() in path.read_bytes() for path in (tmp_path / "mine").rglob("*") if path.is_file())
    run_id = json.loads((tmp_path / "mine" / "wandb.json").read_text())
    logs = sorted((tmp_path / "mine").rglob("*.wandb"))
    assert len(logs) >= 2
    assert all(any(str(value) in log.name for value in run_id.values()) for log in logs)
    rows = [row for log in logs for row in offline_rows(log)]
    for stage in ("encoder", "refiner"):
        assert [row[f"{stage}/step"] for row in rows if f"{stage}/loss" in row] == list(range(1, 7))


@pytest.mark.slow
def test_a_run_in_use_is_refused(tool: Tool, tiny: list[str], tmp_path: Path) -> None:
    import fcntl

    assert tool("launch", *tiny, "stages=[shards]", "run=mine").returncode == 0
    with (tmp_path / "mine" / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        done = tool("launch", *tiny, "run=mine")
    assert done.returncode == 2
    assert "in use by another process" in done.stderr
