"""Damage is made, and ends as promised: named, counted, passed over up to a limit, alike on any number of ranks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from patterns import pixels_of
from PIL import Image

from dvae.data.building.shard_build import build
from dvae.data.images import DamagedImage, check_png, encode_png
from dvae.data.loading.loader import Loader
from dvae.data.loading.order import Order
from dvae.data.shards.reader import PNG, Shards
from dvae.errors import MachineError, UserError

PICTURE = encode_png(pixels_of(0).transpose(1, 2, 0))


def test_no_flipped_bit_of_a_png_gets_by():
    """torchvision's decoder must not see any: some of them take the process down."""
    check_png(PICTURE)
    for bit in range(8 * len(PICTURE)):
        flipped = bytearray(PICTURE)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedImage):
            check_png(bytes(flipped))


@given(st.integers(0, len(PICTURE) - 1))
def test_no_cut_png_gets_by(size: int):
    with pytest.raises(DamagedImage):
        check_png(PICTURE[:size])


@given(st.binary(max_size=200))
@settings(max_examples=50)
def test_noise_is_no_png(data: bytes):
    for text in (data, PICTURE[:8] + data):
        with pytest.raises(DamagedImage):
            check_png(text)


def flip_bit(shards: Path, index: int) -> str:
    """Flip one bit in the middle of a training image; returns its key."""
    data = Shards(shards)
    name, offset, size = data.members.where(index, PNG)
    with (shards / name).open("r+b") as file:
        file.seek(offset + size // 2)
        (byte,) = file.read(1)
        file.seek(offset + size // 2)
        file.write(bytes([byte ^ 16]))
    return str(data.info(index)["key"])


def test_a_flipped_bit_is_named_once_and_passed_over(shards: Path):
    whole, said = Shards(shards).read(range(8))[[0, 1, 2, 3, 4, 5, 7, 7]], list[str]()
    key = flip_bit(shards, 6)
    data = Shards(shards, max_bad_fraction=0.1, report=said.append)
    for _ in range(3):
        assert torch.equal(data.read(range(8)), whole)
    (line,) = said
    assert line.startswith(f"damaged image train-000001.tar:{key} (the checksum of its part at byte ")
    assert line.endswith(f"; 1 of {len(data)}, skipped")


def test_a_shard_cut_in_mid_sample(shards: Path):
    """Samples before the cut are read as they are; the others are passed over where so many may be, else an error."""
    whole = Shards(shards)
    images = whole.read(range(len(whole)))
    inside = [i for i in range(len(whole)) if whole.members.place(i)[0] == "train-000001.tar"]
    middle = inside[len(inside) // 2]
    _, offset, size = whole.members.where(middle, PNG)
    with (shards / "train-000001.tar").open("r+b") as file:
        file.truncate(offset + size // 2)
    tolerant = Shards(shards, max_bad_fraction=0.2)
    found = tolerant.read(range(len(tolerant)))
    lost = [i for i in inside if i >= middle]
    assert sorted(tolerant.damaged) == lost
    kept = [i for i in range(len(whole)) if i not in lost]
    assert torch.equal(found[kept], images[kept])
    assert all(torch.equal(found[i], images[inside[-1] + 1]) for i in lost)
    with pytest.raises(MachineError, match=r"train-000001\.tar.*the file ends .* bytes early"):
        Shards(shards, max_bad_fraction=0.0).read([middle])


@pytest.mark.parametrize("threads", [0, 2])
def test_a_shard_that_vanishes_during_training_is_named(shards: Path, threads: int):
    data = Shards(shards, cache_bytes=0)
    with Loader(data, Order(len(data), 3, block=4, window=2), 4, threads=threads) as loader:
        loader.step(0)
        for path in shards.glob("train-*.tar"):
            path.unlink()
        with pytest.raises(MachineError, match=r"shard .*train-00000\d\.tar cannot be opened \(No such file"):
            [loader.step(sample) for sample in range(4, 80, 4)]


def jpegs(folder: Path, count: int, corrupt: int) -> None:
    """JPEG files, of which the first so many are cut."""
    folder.mkdir()
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(pixels_of(number, 32).transpose(1, 2, 0)).save(file, "JPEG")
        data = file.getvalue()
        (folder / f"{number:03d}.jpg").write_bytes(data[: len(data) // 2] if number < corrupt else data)


def test_a_corrupt_jpeg_is_counted_and_named(tmp_path: Path):
    jpegs(tmp_path / "in", 20, 2)
    source = {"name": "folder", "path": str(tmp_path / "in")}
    manifest = build(source, 16, tmp_path / "out", 0.0, workers=1, max_bad_fraction=0.1)
    assert (manifest.count("train"), manifest.damaged) == (18, 2)
    assert [line.partition(":")[0] for line in manifest.damaged_first] == ["000.jpg", "001.jpg"]
    with pytest.raises(UserError, match=r"more than 0\.05 of 20 images are damaged \(000\.jpg"):
        build(source, 16, tmp_path / "other", 0.0, workers=1, max_bad_fraction=0.05)
    assert not (tmp_path / "other").exists()


def loaders(data: Shards, world: int, batch: int, order: Order) -> list[Loader]:
    return [Loader(data, order, batch, rank=rank, world=world, flip=True, seed=5) for rank in range(world)]


@pytest.mark.parametrize(
    ("shard_size", "world", "batch"),
    [(60, 4, 8), (20, 2, 6), (7, 3, 9), (1, 5, 5), (60, 12, 12)],
    ids=["1 shard on 4 ranks", "3 shards on 2", "9 on 3", "60 on 5", "more ranks than samples in the last block"],
)
def test_any_shards_on_any_ranks(tmp_path: Path, shard_size: int, world: int, batch: int):
    """Each epoch has every sample once, though the batch divides neither it nor a block; the images are one rank's."""
    build({"name": "test_patterns", "count": 60}, 8, tmp_path / "s", 0.0, shard_size=shard_size, workers=1)
    data = Shards(tmp_path / "s")
    assert len(data.shards) == -(-60 // shard_size)
    order = Order(60, seed=2, block=13, window=2)  # the last block has 8
    ranks, seen = loaders(data, world, batch, order), list[int]()
    (alone,) = loaders(data, 1, batch, order)
    for sample in range(0, 180, batch):
        parts = [part for rank in ranks for part in rank.step(sample)]
        (whole,) = alone.step(sample)
        assert torch.equal(torch.cat([part.images for part in parts]), whole.images)
        assert torch.equal(torch.cat([part.keys for part in parts]), whole.keys)
        seen += [int(i) for part in parts for i in part.indices]
    for epoch in range(3):
        assert sorted(seen[60 * epoch : 60 * epoch + 60]) == list(range(60))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_agree_about_damage(shards: Path, world: int):
    """Whoever meets a damaged image takes the same other one: shapes, counts and pixels are those of one rank."""
    for index in (4, 5, 20):
        flip_bit(shards, index)
    order = Order(len(Shards(shards)), seed=3, block=4, window=3)
    options = {"max_bad_fraction": 0.2}
    (alone,) = loaders(Shards(shards, **options), 1, 8, order)
    each = [loaders(Shards(shards, **options), world, 8, order)[rank] for rank in range(world)]
    for sample in range(0, 160, 8):
        (whole,) = alone.step(sample)
        assert torch.equal(torch.cat([part.images for rank in each for part in rank.step(sample)]), whole.images)


def test_damage_that_others_met_counts(shards: Path):
    data = Shards(shards, max_bad_fraction=0.06)  # 2 of 39
    whole = data.read(range(6))
    data.add_damaged({1: "train-000000.tar:a (x)", 2: "train-000000.tar:b (x)"})
    assert np.array_equal(data.substituted(np.arange(6)), [0, 3, 3, 3, 4, 5])
    again = Shards(shards, cache_bytes=0, max_bad_fraction=0.06)
    again.add_damaged(data.damaged)
    assert torch.equal(again.read(range(6)), whole[[0, 3, 3, 3, 4, 5]])
    with pytest.raises(MachineError, match=r"damaged image train-000000\.tar:c .*; 3 of .* so far, more than"):
        data.add_damaged({3: "train-000000.tar:c (x)"})
