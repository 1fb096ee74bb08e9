"""Every recipe composes, fits together at its real size, and is what docs/recipes.md says of it."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig
from tests_support import ROOT, dry_run

from dvae.config import compose as config
from dvae.config.recipe_files import recipe_names
from dvae.errors import UserError
from dvae.models import components
from dvae.registry.refiners.base import REFINERS
from dvae.registry.samplers.base import SAMPLERS
from dvae.registry.schedules.base import SCHEDULES

RECIPES = recipe_names()
every_recipe = pytest.mark.parametrize("recipe", RECIPES)
FOREIGN = ["schedule=cosine", "sampler=dpmpp_2m", "refiner=dit"]


def compose(recipe: str, published: dict[str, str], *words: str) -> DictConfig:
    """A recipe as the command line makes it, with images where it asks for some."""
    composed = config.compose("train", [f"recipe={recipe}", *words])
    if composed.source.name in published:
        composed.source.path = published[composed.source.name]
    return composed


@cache
def table() -> dict[str, list[str]]:
    """The cells of docs/recipes.md behind each recipe's name."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \|(.+)\|$", text, flags=re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def test_the_table_has_every_recipe() -> None:
    assert sorted(table()) == RECIPES


@every_recipe
def test_dry_run_writes_nothing_and_tells_what_the_table_does(
    recipe: str, published: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes are those of the table, and so of the papers: tests/registry checks each preset against them."""
    monkeypatch.chdir(tmp_path)
    composed = compose(recipe, published, "dry_run=true")
    assert composed.recipe == recipe
    if composed.source.name in published:
        composed.evaluate.kid_subset_size = 2
    if composed.teacher:  # a run that is not there yet: what is told then, tests/stages/test_distil.py sees
        with pytest.raises(UserError, match=f"{composed.teacher}: no such run or bundle"):
            dry_run(composed)
        return
    said = dry_run(composed)
    assert f"stages: {' -> '.join(composed.stages)}" in said
    _, images, encoder, refiner, *_ = table()[recipe]
    assert f"{composed.image_size} px" in images
    assert ("encoder" not in composed.stages) == (encoder == "none")
    for stage, size in (("encoder", encoder), ("refiner", refiner)):
        training = composed[f"train_{stage}"]
        if stage in composed.stages:
            assert f"{stage}: {size} parameters, {training.steps} steps of {training.batch} images" in said
    assert said.endswith("dry run: nothing was written")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", [name for name in RECIPES if "estimate" in table()[name][-1]])
def test_a_papers_recipe_tells_images_published_figure_and_estimate(recipe: str) -> None:
    text = (ROOT / "recipes" / "recipe" / f"{recipe}.yaml").read_text(encoding="utf-8")
    head = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    assert head[0] == "@package _global_"
    topics = [line.partition(" ")[0].rstrip(":") for line in head]
    assert [topic for topic in topics if topic in ("Images", "Published")] == ["Images", "Published"]
    memory, days = re.search(r"(\d+) GiB.*, ([\d.]+) d ", table()[recipe][-1]).groups()  # type: ignore[union-attr]
    estimate = " ".join(head).partition("Estimate, not measured")[2]
    assert f" {memory} GiB on " in estimate
    assert f" {days} H100-day" in estimate


@every_recipe
def test_foreign_presets_compose(recipe: str, published: dict[str, str]) -> None:
    """Every preset of a recipe can be replaced on the command line, since it sets no component's fields itself."""
    settings = config.to_run_config(compose(recipe, published, *FOREIGN))
    assert settings.schedule == SCHEDULES.config({"name": "cosine"})
    assert settings.sampler == SAMPLERS.config({"name": "dpmpp_2m"})
    assert settings.refiner == REFINERS.config({"name": "dit"})
    if settings.process.name == "vp" and settings.source.name != "toy2d":  # points have no patches
        components.build_models_on_meta(settings)


def test_dogs_alone_as_diffusevaes_code_takes_them() -> None:
    words = ["source=folder", "source.path=AFHQ/train/dog", "source.resize=bilinear"]
    assert config.to_run_config(config.compose("train", ["recipe=afhq256", *words])).source.name == "folder"
