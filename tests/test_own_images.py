"""Where a run's own images are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from dvae import config
from dvae.data.remote import Remote
from dvae.errors import UserError
from dvae.own_images import open_split, place_of_run
from dvae.tools import shards


def test_shards_are_where_they_were_or_moved_with_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shards.command(["build", "source=avatars", "source.count=12", "size=16", "workers=1", f"out={run / 'shards'}"])
    made = config.typed(config.compose("train", ["recipe=demo", "image_size=16", f"run={run}"]))
    assert place_of_run(str(run), made) == run / "shards"
    moved = run.rename(tmp_path / "moved")
    assert place_of_run(str(moved), made) == moved / "shards"
    assert len(open_split(str(moved), made, "train")) == len(open_split("x", made, "train", str(moved / "shards"))) > 9
    with pytest.raises(UserError, match=r"on shards at .*run/shards, which are not there: name them with real="):
        place_of_run(str(run), made, "real")
    with pytest.raises(UserError, match="no shards at nowhere"):
        open_split(str(moved), made, "train", "nowhere")
    made.data.shards = "http://localhost:1/x"
    assert isinstance(place_of_run(str(run), made), Remote)


def test_points_have_none() -> None:
    made = config.typed(config.compose("train", ["recipe=toy2d"]))
    with pytest.raises(UserError, match="run=r was trained on points"):
        place_of_run("r", made)
