"""Shards that several files of tests read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dvae.data.images import encode_png
from dvae.data.shards.manifest import Manifest
from dvae.data.shards.tar_files import ShardWriter, seal

COUNT = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 images of one gray each, in 3 shards."""
    made, shards = tmp_path / "shards", []
    made.mkdir()
    for number, start in enumerate(range(0, COUNT, 16)):
        writer = ShardWriter(made / f"train-{number:06d}.tar")
        for index in range(start, min(start + 16, COUNT)):
            png = encode_png(torch.full((8, 8, 3), index, dtype=torch.uint8).numpy())
            writer.write(index, {"png": png, "json": json.dumps({"key": str(index), "labels": {}}).encode()})
        writer.close()
        shards.append(seal(writer.path))
    manifest = Manifest(
        image_size=8, channels=3, source={}, license="CC0", protocol="", heldout_fraction=0.0, shard_size=16,
        splits={"train": shards, "heldout": []}, labels={},
    )  # fmt: skip
    (made / "manifest.json").write_text(json.dumps(manifest.as_dict()))
    return made
