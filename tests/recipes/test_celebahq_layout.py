"""A real folder in CelebA-HQ's layout goes through recipe=celebahq256 as it is, killed and resumed on the way."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from shrink import SIZE, shrink
from tests_support import environment

from dvae.config import compose
from dvae.data.shards.verify import verify
from dvae.registry.core import Shapes
from dvae.registry.sources.base import SOURCES
from dvae.runs.folder import submit

FACES = 60
LAUNCH = "import pathlib, sys; from dvae.runs.job import RunJob; RunJob(sys.argv[1])()"


def words(folder: Path, run: Path) -> list[str]:
    return ["recipe=celebahq256", f"source.path={folder}", f"run={run}"]


@pytest.fixture(scope="module")
def celebahq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CelebAMask-HQ's folders with drawn faces of 256 px, and a mask that is none of the images."""
    root = tmp_path_factory.mktemp("data") / "CelebAMask-HQ"
    faces = SOURCES.build({"name": "avatars", "n": FACES}, Shapes(image_size=256))
    images, masks = root / "CelebA-HQ-img", root / "CelebAMask-HQ-mask-anno" / "0"
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for i in range(FACES):
        Image.fromarray(faces[i].image).save(images / f"{i}.jpg", quality=95)
    Image.new("L", (512, 512)).save(masks / "00000_hair.png")
    return root


@pytest.mark.slow
def test_shards_at_full_size_then_a_shrunk_run_that_is_killed_and_resumes(celebahq: Path, tmp_path: Path) -> None:
    """The recipe's own source and size make the shards; its own components, small, train on 256 px."""
    composed = compose.compose("train", words(celebahq, tmp_path / "run"))
    small = shrink(composed)
    small.image_size = composed.image_size
    small.encoder.patch = small.refiner.patch = composed.image_size // SIZE
    small.train_encoder.steps = small.train_refiner.steps = 12
    runs = []
    for name in ("whole", "killed"):
        small.run = str(tmp_path / name)
        small.data.shards = str(tmp_path / "shards")
        runs.append(submit(OmegaConf.create(OmegaConf.to_container(small))))
    command = [sys.executable, "-c", LAUNCH]
    whole, killed = runs
    subprocess.run([*command, str(whole.path)], env=environment(), check=True, capture_output=True, timeout=600)
    verify(tmp_path / "shards")

    process = subprocess.Popen(
        [*command, str(killed.path)], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while not list(killed.checkpoints("refiner").glob("step-*")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert "refiner" not in killed.records()
    subprocess.run([*command, str(killed.path)], env=environment(), check=True, capture_output=True, timeout=600)

    counts = killed.records()["shards"]
    assert counts["train"] + counts["heldout"] == FACES
    assert json.loads(killed.summary.read_text(encoding="utf-8"))["evaluation"]["nfe"] == 2
    a, b = (load_file(run.bundle / "model.safetensors") for run in runs)
    assert a.keys() == b.keys()
    assert all((a[name] == b[name]).all() for name in a)
    assert Image.open(killed.path / "samples.png").width > 256
