"""The benchmark of the loaders: every way sees the same pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dvae.data.shards.reader import Shards
from dvae.errors import UserError
from dvae.experiments.bench import data_bench
from dvae.experiments.bench.data_bench import DataBenchConfig
from dvae.tools.bench import command


def test_every_way_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "figures.json"
    command(["data", "size=16", "n=24", "batch=8", "threads=[0,1]", "rounds=1", f"out={out}"])
    figures = json.loads(out.read_text())
    assert set(figures["loaders"]) == {
        "ours, 0 threads", "ours, 1 threads", "ours, from memory", "ImageFolder, JPEG", "ImageFolder, JPEG, 1 workers",
        "webdataset pil, JPEG", "webdataset pil, PNG", "webdataset torchrgb, JPEG", "webdataset torchrgb, PNG",
    }  # fmt: skip
    assert all(speed > 0 for ways in figures.values() for speed in ways.values())
    printed = capsys.readouterr().out
    assert "| ImageFolder, JPEG " in printed
    assert "| torchvision, PNG  |" in printed


def test_the_shards_hold_what_the_jpegs_decode_to(tmp_path: Path):
    count = data_bench.prepare(tmp_path, DataBenchConfig(size=16, n=5))
    assert count == 5
    images = Shards(tmp_path / "shards").read(range(5))
    for path, image in zip(sorted((tmp_path / "jpeg" / "all").iterdir()), images, strict=True):
        assert np.array_equal(image.permute(1, 2, 0), np.asarray(Image.open(path)))


def test_every_way_goes_over_whole_batches(tmp_path: Path):
    config = DataBenchConfig(size=16, n=20, batch=8, threads=[0])
    data_bench.prepare(tmp_path, config)
    assert {name: way() for name, way in data_bench.loaders(tmp_path, config).items()} == dict.fromkeys(
        data_bench.loaders(tmp_path, config), 16
    )


def test_pictures_of_a_folder(tmp_path: Path):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.png")
    (found,) = data_bench.pictures(DataBenchConfig(folder=str(tmp_path), size=8))
    assert found.shape == (8, 8, 3)
    assert found[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data", "n=4"], "4 images are too few for a batch of 64"),
        (["data", "rounds=0"], "rounds=0: use 1 or more"),
        (["data", "sise=8"], "unknown field 'sise': did you mean 'size'"),
        (["date"], "unknown word 'date': did you mean 'data'"),
    ],
)
def test_mistakes(words: list[str], says: str):
    with pytest.raises(UserError, match=says):
        command(words)


def test_an_empty_folder(tmp_path: Path):
    with pytest.raises(UserError, match="holds no images"):
        list(data_bench.pictures(DataBenchConfig(folder=str(tmp_path))))
