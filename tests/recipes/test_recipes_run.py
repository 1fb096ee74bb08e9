"""Every recipe, shrunk, from images to samples: two steps of each stage, by the launch command's own path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from omegaconf import DictConfig
from shrink import shrink

from dvae.config import compose, validate
from dvae.config.recipe_files import recipe_names
from dvae.inference import pipeline
from dvae.inference.noise import KeyedNoise
from dvae.inference.refine import refine_images
from dvae.runs import folder
from dvae.runs.job import RunJob
from dvae.stages import classifier, refiner

QUICK = {"avatars_distil", "celebahq256_dit", "cifar10", "faces_guided", "ldm_avatars", "mnist", "psld_cifar10"}
"""One of each kind; the others are tried by `make test-slow`."""


def launch(composed: DictConfig) -> folder.Run:
    """What tools/launch.py does with a composed config."""
    validate.check(compose.to_run_config(composed))
    submitted = folder.submit(composed)
    RunJob(str(submitted.path))()
    return submitted


@pytest.mark.parametrize(
    "recipe",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in recipe_names()],
)
def test_a_shrunk_recipe_trains_and_samples(
    recipe: str, published: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refiner, "SCALE_IMAGES", 8)
    monkeypatch.setattr(classifier, "HELDOUT_SAMPLES", 8)
    composed = compose.compose("train", [f"recipe={recipe}", f"run={tmp_path}/run"])
    if composed.source.name in published:
        composed.source.path = published[composed.source.name]
    if composed.teacher:
        own = compose.compose("train", ["recipe=avatars", f"run={tmp_path}/teacher", "evaluate.metrics=false"])
        composed.teacher = str(launch(shrink(own)).path)
        composed.data.shards = f"{composed.teacher}/shards"
    small = shrink(composed)
    done = launch(small)
    assert [name for name in done.records() if "-" not in name] == list(small.stages)
    trained = [stage for stage in ("encoder", "refiner", "classifier") if stage in small.stages]
    trained += [name for name in done.records() if name.startswith("distil-")]
    rows = [json.loads(line) for line in done.metrics.read_text(encoding="utf-8").splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [(stage, step) for stage in trained for step in (1, 2)]
    assert json.loads(done.summary.read_text(encoding="utf-8"))["recipe"] == recipe
    made = pipeline.load(done.path)
    assert made.config.recipe == recipe
    given = made.sample_conditioning(2, 7)
    x = refine_images(made, given, KeyedNoise(7, range(2)))[0]
    assert x.shape == (2, small.channels, small.image_size, small.image_size)
    assert x.isfinite().all()
