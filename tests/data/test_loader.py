"""The loader: ranks and micro-batches cut a global batch, nothing else depends on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from patterns import pixels_of

from dvae.data.images import to_float
from dvae.data.loading.loader import Batch, Loader, check_batch
from dvae.data.loading.order import Order
from dvae.data.shards.reader import Shards
from dvae.errors import UserError


@pytest.fixture
def data(shards: Path) -> Shards:
    return Shards(shards)


def order(data: Shards) -> Order:
    return Order(len(data), seed=3, block=4, window=3)


def gather(data: Shards, world: int, accumulate: int, sample: int, **options: object) -> Batch:
    """The global batch of 24 that all ranks make together, sorted by key."""
    batches: list[Batch] = []
    for rank in range(world):
        loader = Loader(data, order(data), 24, rank=rank, world=world, accumulate=accumulate, seed=5, **options)  # type: ignore[arg-type]
        batches += loader.step(sample)
    keys = torch.cat([batch.keys for batch in batches])
    by_key = keys.argsort()
    return Batch(
        keys[by_key],
        torch.cat([batch.indices for batch in batches])[by_key],
        torch.cat([batch.images for batch in batches])[by_key],
    )


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 3), (4, 2), (3, 8)])
def test_the_global_batch_is_the_same_however_it_is_cut(data: Shards, world: int, accumulate: int):
    for sample in (0, 24, 240):
        batch = gather(data, world, accumulate, sample, flip=True)
        whole = gather(data, 1, 1, sample, flip=True)
        assert batch.keys.tolist() == list(range(sample, sample + 24))
        assert batch.indices.tolist() == order(data).indices(sample, sample + 24).tolist()
        assert torch.equal(batch.images, whole.images)


def test_flips_are_keyed_by_the_sample(data: Shards):
    plain, flipped = gather(data, 1, 1, 48), gather(data, 1, 1, 48, flip=True)
    mirrored = [not torch.equal(a, b) for a, b in zip(plain.images, flipped.images, strict=True)]
    assert 4 <= sum(mirrored) <= 20
    for a, b, mirror in zip(plain.images, flipped.images, mirrored, strict=True):
        assert torch.equal(b, a.flip(-1) if mirror else a)


def test_batches_become_floats(data: Shards):
    batch = gather(data, 1, 1, 0)
    assert torch.equal(batch.to_float(), to_float(batch.images))
    assert batch.to_float().abs().max() <= 1


@pytest.mark.parametrize("threads", [1, 3])
def test_reading_ahead_changes_nothing(data: Shards, threads: int):
    steps = [0, 8, 16, 24, 400, 408, 8, 16]  # jumps forwards and back, as a resumed run does
    inline = Loader(data, order(data), 8, accumulate=2, flip=True)
    with Loader(data, order(data), 8, accumulate=2, flip=True, threads=threads) as ahead:
        for sample in steps:
            for a, b in zip(inline.step(sample), ahead.step(sample), strict=True):
                assert torch.equal(a.keys, b.keys)
                assert torch.equal(a.images, b.images)


@pytest.mark.parametrize(("world", "accumulate", "threads"), [(1, 1, 0), (2, 3, 0), (1, 2, 2)])
def test_labels_stay_with_their_images(data: Shards, world: int, accumulate: int, threads: int):
    names = ["2", "0", "1"]
    labels = data.classes("number", names)
    for rank in range(world):
        with Loader(
            data,
            order(data),
            24,
            rank=rank,
            world=world,
            accumulate=accumulate,
            threads=threads,
            flip=True,
            labels=labels,
        ) as loader:
            for batch in loader.step(0) + loader.step(48):
                keys = [int(data.info(int(i))["key"].removeprefix("pattern.")) for i in batch.indices]
                assert batch.labels is not None
                assert [int(names[label]) for label in batch.labels] == [key % 3 for key in keys]
                for key, image in zip(keys, batch.images.numpy(), strict=True):
                    drawn = pixels_of(key)
                    assert np.array_equal(image, drawn) or np.array_equal(image, drawn[:, :, ::-1])


def test_a_run_without_classes_has_no_labels(data: Shards):
    assert gather(data, 1, 1, 0).labels is None


def test_a_batch_larger_than_the_data_set(data: Shards):
    (batch,) = Loader(data, order(data), 3 * len(data)).step(0)
    assert batch.indices.bincount().tolist() == [3] * len(data)


def test_an_order_of_another_data_set(data: Shards):
    with pytest.raises(ValueError, match="the order is of 7 samples"):
        Loader(data, Order(7), 8)


@pytest.mark.parametrize(
    ("batch", "ranks", "micro", "says"),
    [
        (100, 8, 3, "batch 100 does not divide into 8 ranks x 3 micro-batches: use 96 or 120"),
        (7, 4, 2, "batch 7 does not divide into 4 ranks x 2 micro-batches: use 8"),
        (0, 2, 1, "batch 0 does not divide into 2 ranks x 1 micro-batches: use 2"),
    ],
)
def test_a_batch_that_does_not_divide(batch: int, ranks: int, micro: int, says: str):
    with pytest.raises(UserError) as error:
        check_batch(batch, ranks, micro)
    assert str(error.value) == says


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
def test_a_batch_that_divides(part: int, ranks: int, micro: int):
    assert check_batch(part * ranks * micro, ranks, micro) == part
