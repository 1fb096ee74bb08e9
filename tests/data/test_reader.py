"""Reading: the right pixels, cached or not, from any thread; damage replaced up to a limit."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from patterns import pixels_of

from dvae.data.building.shard_build import build
from dvae.data.shards import members
from dvae.data.shards.reader import JSON, PNG, Shards
from dvae.errors import MachineError, UserError


def number(shards: Shards, index: int) -> int:
    return int(shards.info(index)["key"].removeprefix("pattern."))


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_image_is_read(shards: Path, split: str, cache_bytes: int):
    data = Shards(shards, split, cache_bytes)
    for _ in range(2):  # the second time from memory
        images = data.read(range(len(data)))
        assert images.shape == (len(data), 3, 8, 8)
        assert images.dtype == torch.uint8
        for index in range(len(data)):
            assert np.array_equal(images[index], pixels_of(number(data, index)))


def test_indices_in_any_order_and_twice(shards: Path):
    data = Shards(shards)
    assert torch.equal(data.read([3, 1, 3]), torch.stack([data.read([i])[0] for i in (3, 1, 3)]))
    assert data.read(torch.tensor([2])).shape == (1, 3, 8, 8)


def test_what_is_read_is_the_callers_to_change(shards: Path):
    data = Shards(shards)
    before = data.read([0]).clone()
    data.read([0]).zero_()
    assert torch.equal(data.read([0]), before)


def test_about_and_labels(shards: Path):
    data = Shards(shards)
    about = data.info(5)
    assert about["labels"]["parity"] == ("odd" if number(data, 5) % 2 else "even")
    assert data.labels["parity"] == ["even", "odd"]


def test_classes_are_the_numbers_of_an_attributes_values(shards: Path):
    data = Shards(shards)
    keys = torch.tensor([number(data, i) for i in range(len(data))])
    assert torch.equal(data.classes("parity", ["odd", "even"]), 1 - keys % 2)
    assert torch.equal(data.classes("number", ["2", "1", "0", "none like it"]), 2 - keys % 3)  # empty classes are fine


@pytest.mark.parametrize(
    ("attribute", "names", "says"),
    [
        ("partiy", ["odd", "even"], "data.label=partiy: the images have no such attribute: did you mean 'parity'?"),
        ("parity", ["odd", "evn"], "data.label=parity: 'even' is not one of the classes odd, evn: name every value"),
    ],
)
def test_unknown_attributes_and_values(shards: Path, attribute: str, names: list[str], says: str):
    with pytest.raises(UserError, match=re.escape(says)):
        Shards(shards).classes(attribute, names)


def test_an_image_without_the_attribute_is_named(shards: Path):
    data = Shards(shards)
    key = data.info(3)["key"]
    name, offset, size = data.members.where(3, JSON)
    with (shards / name).open("r+b") as file:
        file.seek(offset)
        text = file.read(size)
        file.seek(offset)
        file.write(text.replace(b"parity", b"purity"))
    with pytest.raises(UserError, match=rf"data\.label=parity: image {re.escape(key)} has no such attribute"):
        Shards(shards).classes("parity", ["odd", "even"])


def test_damage_does_not_part_images_from_their_classes(shards: Path):
    whole = Shards(shards)
    classes = whole.classes("parity", ["odd", "even"])
    damage(shards, 4)
    name, offset, size = whole.members.where(7, JSON)
    with (shards / name).open("r+b") as file:  # the text of another
        file.seek(offset)
        file.write(b"\xff" * size)
    data = Shards(shards, max_bad_fraction=0.1)
    found = data.classes("parity", ["odd", "even"])
    images = data.read(range(10))
    shown = data.substituted(np.arange(10))
    assert shown.tolist() == [0, 1, 2, 3, 5, 5, 6, 8, 8, 9]
    assert torch.equal(images, whole.read(shown))
    assert torch.equal(found[shown], classes[shown])
    assert "labels" in data.damaged[7]
    with pytest.raises(MachineError, match="more than"):
        Shards(shards, max_bad_fraction=0.0).classes("parity", ["odd", "even"])


def test_gray(tmp_path: Path):
    build({"name": "test_patterns"}, 8, tmp_path / "s", 0.0, channels=1, workers=1)
    assert np.array_equal(Shards(tmp_path / "s").read([4])[0], pixels_of(4, channels=1))


def test_threads_read_the_same(shards: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(members, "OPEN_FILES", 2)  # so that files are evicted while others read
    for cache in (0, 2**20):
        data = Shards(shards, cache_bytes=cache)
        expected = Shards(shards, cache_bytes=0).read(range(len(data)))
        orders = [np.random.default_rng(i).permutation(len(data)) for i in range(16)]
        with ThreadPoolExecutor(8) as pool:
            for order, images in zip(orders, pool.map(data.read, orders), strict=True):
                assert torch.equal(images, expected[order])


def test_files_are_closed(shards: Path):
    before = len(os.listdir("/proc/self/fd"))
    data = Shards(shards, cache_bytes=0)
    data.read(range(len(data)))
    assert len(os.listdir("/proc/self/fd")) > before
    del data
    assert len(os.listdir("/proc/self/fd")) == before


def damage(shards: Path, index: int) -> str:
    """Overwrite the PNG of one training image; returns its key."""
    data = Shards(shards)
    key = data.info(index)["key"]
    name, offset, size = data.members.where(index, PNG)
    with (shards / name).open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * size)
    return key


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_a_damaged_image_is_replaced_by_the_next(shards: Path, cache_bytes: int):
    whole = Shards(shards).read(range(10))
    key = damage(shards, 4)
    data = Shards(shards, cache_bytes=cache_bytes, max_bad_fraction=0.1)
    assert torch.equal(data.read(range(10)), whole[[0, 1, 2, 3, 5, 5, 6, 7, 8, 9]])
    assert list(data.damaged) == [4]
    assert key in data.damaged[4]


def test_a_cut_shard_is_damage_too(shards: Path):
    data = Shards(shards)
    last = data.manifest.splits["train"][-1]
    with (shards / last.file).open("r+b") as file:
        file.truncate(int(np.load(shards / last.index)[-1, 0]) + 10)
    tolerant = Shards(shards, max_bad_fraction=0.1)
    assert torch.equal(tolerant.read([len(data) - 1]), data.read([0]))  # past the end comes the first
    assert "ends" in tolerant.damaged[len(data) - 1]


def test_too_much_damage_is_an_error_every_time(shards: Path):
    key = damage(shards, 4)
    data = Shards(shards)
    for _ in range(2):
        with pytest.raises(MachineError, match=rf"train-000000\.tar:{key} .*verify"):
            data.read([4])


def test_a_png_of_another_size_is_damage(shards: Path):
    manifest = json.loads((shards / "manifest.json").read_text())
    (shards / "manifest.json").write_text(json.dumps({**manifest, "image_size": 9}))
    with pytest.raises(MachineError, match=r"shape \(3, 8, 8\)"):
        Shards(shards).read([0])


def test_a_vanished_shard_is_named(shards: Path):
    data = Shards(shards)
    (shards / "train-000001.tar").unlink()
    with pytest.raises(MachineError, match=r"train-000001\.tar"):
        data.read([8])
    with pytest.raises(MachineError, match=r"train-000001\.tar is missing"):
        Shards(shards)


def test_a_damaged_index_is_named(shards: Path):
    (shards / "train-000001.npy").write_bytes(b"nonsense")
    with pytest.raises(MachineError, match=r"train-000001\.npy is damaged"):
        Shards(shards)


def test_unknown_and_empty_splits(tmp_path: Path, shards: Path):
    with pytest.raises(UserError, match="did you mean 'train'"):
        Shards(shards, "trian")
    build({"name": "test_patterns"}, 8, tmp_path / "all", 0.0, workers=1)
    with pytest.raises(UserError, match="no image in 'heldout'"):
        Shards(tmp_path / "all", "heldout")


def test_an_index_out_of_range(shards: Path):
    for cache in (0, 2**20):
        with pytest.raises(IndexError):
            Shards(shards, cache_bytes=cache).read([50])
        with pytest.raises(IndexError):
            Shards(shards, cache_bytes=cache).read([-1])
