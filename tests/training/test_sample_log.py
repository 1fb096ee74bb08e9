"""The records of a stage's samples: none twice in an epoch, none missed, also across stops and numbers of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dvae.config.schema import TrainingConfig
from dvae.data.loading.loader import Loader
from dvae.data.loading.order import Order
from dvae.data.shards.reader import PNG, Shards
from dvae.errors import MachineError
from dvae.training.resilience import sample_log
from dvae.training.resilience.damage_record import load_damaged
from dvae.training.resilience.sample_log import SynchronizedLoader, samples_file

COUNT, BATCH = 40, 8
TRAINING = TrainingConfig(batch=BATCH, steps=20, log_every=2)


Take = Callable[[int, range], list[list[torch.Tensor]]]


@pytest.fixture
def take(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Take:
    """take(world, steps): an attempt of so many ranks at these steps, one after the other; the ranks' images by step.

    Rank 0 comes last, with what the others gave in its hands, as a collective would have put it there.
    """

    def attempt(world: int, steps: range) -> list[list[torch.Tensor]]:
        given: dict[int, list[Any]] = {}
        images: list[list[torch.Tensor]] = [[] for _ in steps]
        for rank in reversed(range(world)):
            calls = iter(range(10**6))

            def all_gather(value: Any, rank: int = rank, calls: Any = calls) -> list[Any]:
                parts = given.setdefault(next(calls), [])
                parts.insert(0, value)
                return list(parts)

            monkeypatch.setattr(sample_log.ranks, "all_gather", all_gather)
            monkeypatch.setattr(sample_log.ranks, "rank", lambda rank=rank: rank)
            shards = Shards(folder, max_bad_fraction=0.1)
            order = Order(COUNT, seed=1, block=6, window=2)
            loader = Loader(shards, order, BATCH, rank=rank, world=world)
            with SynchronizedLoader(loader, shards, TRAINING, "refiner", tmp_path, log_samples=True) as data:
                for number, step in enumerate(steps):
                    images[number] = [batch.images for batch in data.step(BATCH * (step - 1))] + images[number]
        return images

    return attempt


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in samples_file(run, "refiner").read_text().splitlines()]


def test_every_sample_once_an_epoch_across_stops_and_ranks(take: Take, tmp_path: Path):
    take(1, range(1, 4))
    take(4, range(3, 9))  # killed at step 3, which was not saved
    take(2, range(8, 13))  # killed in step 8
    take(1, range(13, 21))
    found = rows(tmp_path)
    assert [row["step"] for row in found] == list(range(1, 21))
    assert [key for row in found for key in row["samples"]] == list(range(20 * BATCH))
    indices = [index for row in found for index in row["indices"]]
    for start in range(0, 20 * BATCH, COUNT):
        assert sorted(indices[start : start + COUNT]) == list(range(COUNT))
    assert indices == Order(COUNT, seed=1, block=6, window=2).indices(0, 20 * BATCH).tolist()


def test_what_is_recorded_is_what_was_handed_out(take: Take, tmp_path: Path):
    images = take(4, range(1, 6))
    for row, parts in zip(rows(tmp_path), images, strict=True):
        assert torch.cat(parts)[:, 0, 0, 0].tolist() == row["indices"]


def test_a_torn_line_is_replaced(take: Take, tmp_path: Path):
    take(1, range(1, 4))
    with samples_file(tmp_path, "refiner").open("a") as file:
        file.write('{"stage": "refi')
    take(1, range(4, 6))
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5]


def spoil(folder: Path, *indices: int) -> None:
    shards = Shards(folder)
    for index in indices:
        name, offset, size = shards.members.where(index, PNG)
        with (folder / name).open("r+b") as file:
            file.seek(offset)
            file.write(b"\0" * size)


def test_damage_that_one_rank_met_is_recorded_for_all(take: Take, folder: Path, tmp_path: Path):
    spoil(folder, 7, 30)
    take(2, range(1, 6))  # one epoch
    known = load_damaged(tmp_path, "train")
    assert sorted(known) == [7, 30]
    assert "train-000000.tar:7" in known[7]
    assert load_damaged(tmp_path, "heldout") == {}


def test_too_much_damage_over_all_ranks_ends_the_run(take: Take, folder: Path, tmp_path: Path):
    """No rank alone meets more than may be in an epoch: 4 of 40."""
    spoil(folder, 1, 9, 17, 25, 33, 38)
    with pytest.raises(MachineError, match=r"more than are allowed"):
        take(4, range(1, 6))
    assert load_damaged(tmp_path, "train").keys() < {1, 9, 17, 25, 33, 38}
