"""State saved by n ranks at one ZeRO stage and taken up by m ranks at another: every value, and the losses after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from spawned_ranks import on_ranks
from torch import nn

from dvae.config.schema import EmaConfig, Precision, TrainingConfig
from dvae.training.engine.deepspeed_engine import Engine, start_distributed
from dvae.training.engine.fragments import SavedEngine
from dvae.training.resilience import ranks

STAGES = [0, 1, 2, 3]
BATCH = 6
KINDS = {"exp_avg", "exp_avg_sq", "ema"}


class Net(nn.Module):
    """Sizes that 2 and 3 ranks do not divide, one tensor that ZeRO 3 cuts up, small ones that it keeps whole."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(7, 16411)  # DeepSpeed cuts what has 100,000 values or more
        self.narrow = nn.Linear(16411, 5)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(torch.tanh(self.wide(x))) * self.scale


def make(stage: int) -> Engine:
    torch.manual_seed(0)
    settings = TrainingConfig(
        batch=BATCH, zero_stage=stage, lr=1e-3, warmup=0, precision=Precision.fp32, ema=EmaConfig(decay=0.5)
    )
    return Engine(Net(), settings)


def train(engine: Engine, first: int, last: int) -> list[float]:
    """Losses of the whole batch, of which each rank takes its share."""
    losses = []
    share = BATCH // ranks.world_size()
    for number in range(first, last + 1):
        x = torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(number))
        x = x[ranks.rank() * share : (ranks.rank() + 1) * share]
        loss = (engine(x) - x[:, :5]).square().mean()
        engine.backward(loss)
        assert engine.step(number)
        losses.append(sum(ranks.all_gather(loss.item())) / ranks.world_size())
    return losses


def save(engine: Engine, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    engine.snapshot().write(folder / f"rank-{ranks.rank():05d}.safetensors")
    ranks.barrier()


def a_rank(number: int, count: int, work: Path) -> None:
    losses = {}
    for stage in STAGES:
        engine = make(stage)
        train(engine, 1, 1)  # values of its own, to be replaced
        engine.load(work / "one")
        save(engine, work / f"{count}-{stage}-loaded")
        losses[stage] = train(engine, 4, 5)
        save(engine, work / f"{count}-{stage}")
        engine.close()
    if number == 0:
        (work / f"losses-{count}.json").write_text(json.dumps(losses))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process saved after 3 steps; 2 ranks, and 3, took it up at every stage and went on to step 5."""
    start_distributed()
    folder = tmp_path_factory.mktemp("elastic")
    engine = make(1)
    train(engine, 1, 3)
    save(engine, folder / "one")
    for count in (2, 3):
        on_ranks(count, a_rank, count, folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed() -> list[float]:
    start_distributed()
    return train(make(0), 1, 7)


def same(one: Path, other: Path) -> None:
    ours, theirs = SavedEngine(one), SavedEngine(other)
    assert ours.shapes == theirs.shapes
    for name in ours.shapes:
        assert ours.kinds[name] == theirs.kinds[name] == KINDS
        assert ours.steps[name] == theirs.steps[name]
        for kind in ("weight", *KINDS):
            assert torch.equal(ours.tensor(kind, name), theirs.tensor(kind, name)), (kind, name)
    assert ours.buffers().keys() == theirs.buffers().keys() == {"scale"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("count", [2, 3])
def test_every_value_is_taken_up(work: Path, count: int, stage: int) -> None:
    same(work / "one", work / f"{count}-{stage}-loaded")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_losses_go_on_as_if_nothing_had_happened(work: Path, count: int, undisturbed: list[float]) -> None:
    for losses in json.loads((work / f"losses-{count}.json").read_text()).values():
        assert losses == pytest.approx(undisturbed[3:5], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("count", [2, 3])
def test_and_back_to_one_process(work: Path, count: int, stage: int, undisturbed: list[float], tmp_path: Path) -> None:
    engine = make((stage + 1) % 4)
    engine.load(work / f"{count}-{stage}")
    save(engine, tmp_path / "again")
    same(work / f"{count}-{stage}", tmp_path / "again")
    assert train(engine, 6, 7) == pytest.approx(undisturbed[5:7], rel=1e-4)


@pytest.mark.slow
def test_a_file_that_lacks_values_is_not_taken_up(work: Path, tmp_path: Path) -> None:
    from dvae.errors import MachineError

    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "rank-00000.safetensors").write_bytes((work / "2-2" / "rank-00000.safetensors").read_bytes())
    with pytest.raises(MachineError, match=r"are not in this checkpoint|is not in both"):
        make(0).load(tmp_path / "half")
