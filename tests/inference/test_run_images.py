"""Where a run's own images are found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dvae.config import compose
from dvae.config.model_config import model_config
from dvae.config.schema import ModelConfig
from dvae.errors import UserError
from dvae.inference.run_images import open_split, run_shards
from dvae.models import bundle_export, components
from dvae.runs.folder import Run, submit
from dvae.tools import shards


def made(run: Path, *words: str) -> ModelConfig:
    """A run folder that was submitted with these words, and what inference needs of it."""
    composed = compose.compose("train", ["recipe=demo", "image_size=16", f"run={run}", *words])
    submit(composed)
    return model_config(compose.to_run_config(composed))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder of shards where a run has its own."""
    out = tmp_path / "run" / "shards"
    shards.command(["build", "source=avatars", "source.n=12", "size=16", "workers=1", f"out={out}"])
    out.rename(tmp_path / "shards")
    return tmp_path / "run"


def test_shards_are_where_they_were_or_moved_with_the_run(run: Path) -> None:
    own = made(run)
    shutil.copytree(run.parent / "shards", run / "shards")
    assert run_shards(str(run), own) == run / "shards"
    moved = run.rename(run.parent / "moved")
    assert run_shards(str(moved), own) == moved / "shards"
    assert len(open_split(str(moved), own, "train")) == len(open_split("x", own, "train", str(moved / "shards"))) > 9
    (moved / "shards").rename(moved / "other")
    with pytest.raises(UserError, match=r"on shards at .*run/shards, which are not there: name them with real="):
        run_shards(str(moved), own, "real")
    with pytest.raises(UserError, match="no shards at nowhere"):
        open_split(str(moved), own, "train", "nowhere")


@pytest.mark.parametrize("place", ["http://localhost:1/x", "pipe:touch PWNED; false"])
def test_a_place_elsewhere_is_opened_only_if_the_command_names_it(run: Path, place: str) -> None:
    own = made(run, f"data.shards='{place}'")
    with pytest.raises(UserError, match=r"is used only if your own command names it: add shards="):
        open_split(str(run), own, "train")
    assert not list(run.parent.rglob("PWNED"))
    named = f"pipe:cat {run.parent / 'shards'}/%s"
    assert len(open_split(str(run), own, "train", named)) > 9


def test_a_bundle_says_nothing_of_images(run: Path, tmp_path: Path) -> None:
    own = made(run)
    bundle_export.export(tmp_path / "bundle", Run(run).config(), {})
    for folder in (str(tmp_path / "bundle"), str(tmp_path / "nowhere")):
        with pytest.raises(UserError, match="is a bundle and has no images: name the run's with shards="):
            run_shards(folder, own)
    assert len(open_split(str(tmp_path / "bundle"), own, "train", str(tmp_path / "shards"))) > 9


def test_points_have_none() -> None:
    own = model_config(compose.to_run_config(compose.compose("train", ["recipe=toy2d"])))
    assert components.build_models(own).shapes.channels == 2
    with pytest.raises(UserError, match="run=r draws points"):
        run_shards("r", own)
