"""Shards: readable by plain WebDataset, the same bytes every time, complete or absent, disjoint splits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import webdataset
from patterns import pixels_of
from PIL import Image

from dvae.data.building.shard_build import build
from dvae.data.images import decode
from dvae.data.shards.manifest import Manifest
from dvae.data.shards.tar_files import index_of
from dvae.errors import UserError

PATTERNS = {"name": "test_patterns"}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def samples(folder: Path, split: str) -> list[dict]:
    urls = [str(folder / shard.file) for shard in Manifest.load(folder).splits[split]]
    return list(webdataset.WebDataset(urls, shardshuffle=False))


def test_plain_webdataset_reads_every_image(shards: Path):
    manifest = Manifest.load(shards)
    assert manifest.count("train") + manifest.count("heldout") == 50
    seen = {}
    for split in ("train", "heldout"):
        read = samples(shards, split)
        assert len(read) == manifest.count(split)
        for sample in read:
            seen[json.loads(sample["json"])["key"]] = np.asarray(decode(sample["png"], "x")).transpose(2, 0, 1)
    assert sorted(seen) == sorted(f"pattern.{i}" for i in range(50))
    assert all(np.array_equal(seen[f"pattern.{i}"], pixels_of(i)) for i in range(50))


def test_manifest_tells_what_is_there(shards: Path):
    manifest = Manifest.load(shards, image_size=8, channels=3)
    assert manifest.source == {"name": "test_patterns", "count": 50, "damaged": 0, "distinct": 0}
    assert manifest.license == "CC0 1.0"
    assert manifest.labels == {"number": [0, 1, 2], "parity": ["even", "odd"]}
    for shard in manifest.splits["train"]:
        assert shard.count <= 7
        data = (shards / shard.file).read_bytes()
        assert len(data) == shard.bytes
        offset, size, about, length = np.load(shards / shard.index)[-1]
        assert data[offset : offset + 4] == b"\x89PNG"
        assert decode(data[offset : offset + size], "x").size == (8, 8)
        assert "labels" in json.loads(data[about : about + length])
        assert np.array_equal(index_of(shards / shard.file), np.load(shards / shard.index))


def test_bytes_do_not_depend_on_workers(shards: Path, tmp_path: Path):
    build(PATTERNS, 8, tmp_path / "again", 0.2, shard_size=7, workers=1)
    assert content(tmp_path / "again") == content(shards)
    # other processes know nothing of this test's source, so they read files
    (tmp_path / "in").mkdir()
    for i in range(260):
        Image.fromarray(pixels_of(i).transpose(1, 2, 0)).save(tmp_path / "in" / f"{i}.png")
    pictures = {"name": "folder", "path": str(tmp_path / "in")}
    build(pictures, 8, tmp_path / "one", 0.2, shard_size=99, workers=1)
    build(pictures, 8, tmp_path / "two", 0.2, shard_size=99, workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert [shard.file for shard in Manifest.load(tmp_path / "two").splits["train"]] == [
        f"train-{n:06d}.tar" for n in range(3)
    ]


def test_identical_images_land_on_one_side(tmp_path: Path):
    build({**PATTERNS, "count": 300, "distinct": 60}, 8, tmp_path / "s", 0.3, workers=1)
    sides = [{sample["png"] for sample in samples(tmp_path / "s", split)} for split in ("train", "heldout")]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 60
    assert len(sides[1]) > 5


def test_the_held_out_share_is_what_was_asked(tmp_path: Path):
    manifest = build({**PATTERNS, "count": 1000}, 2, tmp_path / "s", 0.1, workers=1)
    assert 57 <= manifest.count("heldout") <= 143  # 100 +- 4.5 standard deviations


def test_nothing_held_out(tmp_path: Path):
    manifest = build(PATTERNS, 8, tmp_path / "s", 0.0, workers=1)
    assert (manifest.count("train"), manifest.splits["heldout"]) == (50, [])


def test_gray_images(tmp_path: Path):
    build(PATTERNS, 8, tmp_path / "s", 0.0, channels=1, workers=1)
    assert decode(samples(tmp_path / "s", "train")[3]["png"], "x").mode == "L"


def test_a_percent_sign_and_brackets_in_the_folder_name(tmp_path: Path):
    assert build(PATTERNS, 8, tmp_path / "100%d [x]", 0.1, workers=1).count("train") > 0


def test_progress_reaches_the_end(tmp_path: Path):
    calls: list[tuple[int, int]] = []
    build(PATTERNS, 8, tmp_path / "s", workers=1, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 50) for i in range(51)]


def test_damaged_images_are_counted_and_named(tmp_path: Path):
    manifest = build({**PATTERNS, "damaged": 2}, 8, tmp_path / "s", workers=1, max_bad_fraction=0.05)
    assert manifest.damaged == 2
    assert manifest.damaged_first == ["pattern.0: made so", "pattern.1: made so"]
    assert manifest.count("train") + manifest.count("heldout") == 48


def test_too_many_damaged_images_are_an_error_and_leave_nothing(tmp_path: Path):
    with pytest.raises(UserError, match=r"pattern\.0: made so"):
        build({**PATTERNS, "damaged": 9}, 8, tmp_path / "s", workers=1, max_bad_fraction=0.1)
    assert list(tmp_path.iterdir()) == []


def test_the_same_request_again_is_left_alone_and_another_is_refused(shards: Path):
    before = {path: path.stat().st_mtime_ns for path in shards.iterdir()}
    assert build(PATTERNS, 8, shards, 0.2, shard_size=7) == Manifest.load(shards)
    assert {path: path.stat().st_mtime_ns for path in shards.iterdir()} == before
    with pytest.raises(UserError, match=r"image_size 8, not 16"):
        build(PATTERNS, 16, shards, 0.2, shard_size=7)
    with pytest.raises(UserError, match=r"source\.count 50, not 51"):
        build({**PATTERNS, "count": 51}, 8, shards, 0.2, shard_size=7)


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="holds no shards"):
        build(PATTERNS, 8, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"size": 0}, "size=0"),
        ({"channels": 2}, "channels=2"),
        ({"heldout_fraction": 1.0}, "heldout_fraction=1.0"),
        ({"shard_size": 0}, "shard_size=0"),
        ({"workers": 0}, "workers=0"),
        ({"source_node": {"name": "test_pattern"}}, "did you mean 'test_patterns'"),
        ({"source_node": {"name": "test_patterns", "cuont": 3}}, "did you mean 'count'"),
    ],
)
def test_wrong_requests_end_in_one_line_and_write_nothing(tmp_path: Path, wrong: dict, says: str):
    with pytest.raises(UserError, match=says) as error:
        build(**{"source_node": PATTERNS, "size": 8, "out": tmp_path / "s", **wrong})
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
