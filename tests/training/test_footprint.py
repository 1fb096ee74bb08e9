"""Bytes per rank, counted from the tensors that are alive, against the formula."""

from __future__ import annotations

import gc
import json
import warnings
from pathlib import Path

import pytest
import torch
from spawned_ranks import on_ranks
from torch import nn

from dvae.settings import Precision, TrainingConfig
from dvae.training import ranks
from dvae.training.engine import Engine, start_distributed
from dvae.training.footprint import bytes_per_rank

SETTINGS = [(stage, precision) for stage in range(4) for precision in Precision]
SIDE, LAYERS = 400, 4
PARAMETERS = LAYERS * SIDE * SIDE


def alive() -> int:
    """Bytes of all storages that a tensor lives in."""
    gc.collect()
    storages = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asked for their class, deprecated objects of torch warn
        tensors = [item for item in gc.get_objects() if isinstance(item, torch.Tensor)]
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for address, size in storages.items() if address)


def counted(stage: int, precision: Precision) -> tuple[int, int]:
    """Bytes between steps, and before one, of an engine after its first step."""
    before = alive()
    module = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)))
    engine = Engine(module, TrainingConfig(batch=4, zero_stage=stage, precision=precision))
    for number in (1, 2):
        loss = engine(torch.randn(4 // ranks.world_size(), SIDE)).square().mean()
        engine.backward(loss)
        del loss
        full = alive() - before
        engine.step(number)
        between = alive() - before
    engine.close()
    return between, full


def a_rank(number: int, out: Path) -> None:
    figures = [counted(stage, precision) for stage, precision in SETTINGS]
    (out / f"{number}.json").write_text(json.dumps(figures))


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[int, int]]]:
    out = tmp_path_factory.mktemp("footprint")
    on_ranks(2, a_rank, out)
    return [json.loads((out / f"{number}.json").read_text()) for number in range(2)]


@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_two_ranks_keep_what_the_formula_says(on_two: list[list[tuple[int, int]]], number: int) -> None:
    stage, precision = SETTINGS[number]
    expected = bytes_per_rank(PARAMETERS, 2, TrainingConfig(zero_stage=stage, precision=precision))
    for figures in on_two:
        assert figures[number] == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("stage", "precision"), SETTINGS)
def test_one_rank_keeps_what_the_formula_says(stage: int, precision: Precision) -> None:
    start_distributed()
    expected = bytes_per_rank(PARAMETERS, 1, TrainingConfig(zero_stage=stage, precision=precision))
    assert counted(stage, precision) == pytest.approx(expected, rel=0.05)


def test_a_part_shrinks_with_the_ranks() -> None:
    per_rank = [bytes_per_rank(10**9, ranks, TrainingConfig(zero_stage=2))[0] for ranks in (1, 8, 64)]
    assert per_rank == [20 * 10**9, 6 * 10**9, 4.25 * 10**9]
