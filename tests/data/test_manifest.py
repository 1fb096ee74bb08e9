"""Loading a manifest: one line for every way it can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dvae.data.shards.manifest import Manifest
from dvae.errors import UserError


def test_round_trip(shards: Path):
    manifest = Manifest.load(shards)
    assert json.loads((shards / "manifest.json").read_text()) == json.loads(json.dumps(manifest.as_dict()))


def test_no_shards(tmp_path: Path):
    with pytest.raises(UserError, match=r"no shards at .*: build them with"):
        Manifest.load(tmp_path / "nowhere")


def test_another_size_names_both(shards: Path):
    with pytest.raises(UserError, match=r"image_size 8, not the requested 32"):
        Manifest.load(shards, image_size=32)
    with pytest.raises(UserError, match=r"channels 3, not the requested 1"):
        Manifest.load(shards, channels=1)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 99}', '{"version": 1}', '{"version": 1, "splits": 3}'])
def test_a_damaged_manifest(shards: Path, text: str):
    (shards / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="build the shards again") as error:
        Manifest.load(shards)
    assert "\n" not in str(error.value)
