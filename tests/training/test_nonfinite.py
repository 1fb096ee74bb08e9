"""Steps that are not finite: nothing of them is kept at any ZeRO stage, they are counted, saved, and end the run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from spawned_ranks import on_ranks
from torch import nn

from dvae.config.schema import EmaConfig, Precision, TrainingConfig
from dvae.data.loading.loader import Batch
from dvae.errors import MachineError
from dvae.training.engine.deepspeed_engine import Engine, start_distributed
from dvae.training.loop import train_step
from dvae.training.resilience import ranks
from dvae.training.resilience.nonfinite import MAX_SAVED
from dvae.training.train_state import TrainState
from dvae.training.train_task import Engines, StepOutput, TrainTask

BATCH = 4


class Poisoned(TrainTask):
    """Two modules on random numbers; `poison` are the sample numbers whose loss of module `bad` is not a number."""

    name = "encoder"

    def __init__(self, config: TrainingConfig, poison: set[int], bad: str = "encoder") -> None:
        super().__init__(config, seed=0, device=torch.device("cpu"))
        self.poison, self.bad = poison, bad
        torch.manual_seed(0)
        self.nets = {
            name: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.SiLU(), nn.Linear(8, 6))
            for name in ("encoder", "discriminator")
        }

    def modules(self) -> dict[str, nn.Module]:
        return dict(self.nets)

    def loss(self, name: str, engines: Engines, batch: Batch) -> StepOutput:
        x = batch.images
        losses = (engines[name](x) - x).square().mean(1)
        if name == self.bad:
            losses = losses * torch.tensor([math.nan if int(key) in self.poison else 1.0 for key in batch.keys])
        metrics = {"loss": (float(losses.detach().sum()), float(len(losses)))} if name == "encoder" else {}
        return StepOutput(losses.mean(), metrics)


def batches(step: int, micro: int, rank: int = 0, world: int = 1) -> list[Batch]:
    """The micro-batches of a rank, as the loader cuts them."""
    keys = torch.arange((step - 1) * BATCH, step * BATCH)
    x = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(step))
    parts = list(zip(keys.chunk(micro * world), x.chunk(micro * world), strict=True))
    return [Batch(k, k + 1000, i) for k, i in parts[rank::world]]


def make(zero: int, skips: int, poison: set[int], bad: str = "encoder", micro: int = 1, **more: object) -> Poisoned:
    config = TrainingConfig(
        batch=BATCH, micro_batches=micro, lr=1e-2, warmup=0, zero_stage=zero, nonfinite_skips=skips,
        ema=EmaConfig(decay=0.5), **more,
    )  # fmt: skip
    return Poisoned(config, poison, bad)


def engines_of(stage: Poisoned) -> dict[str, Engine]:
    return {name: Engine(module, stage.config) for name, module in stage.modules().items()}


def everything(engines: dict[str, Engine]) -> dict[str, torch.Tensor]:
    """Weights, buffers, moments, averages and step counts of this rank, and the weights of all ranks."""
    seen = {}
    for name, engine in engines.items():
        seen |= {f"{name} {key}": value for key, value in engine.weights().items()}
        for number, (_, known) in enumerate(sorted(engine.optimizer.state.items(), key=lambda item: id(item[0]))):
            seen |= {f"{name} {number} {key}": torch.as_tensor(value).clone() for key, value in known.items()}
    return seen


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(autouse=True, scope="module")
def _distributed() -> None:
    start_distributed()


@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("precision", list(Precision))
@pytest.mark.parametrize(("bad", "micro"), [("encoder", 1), ("discriminator", 2)])
def test_nothing_of_a_step_is_kept_and_training_goes_on(
    zero: int, precision: Precision, bad: str, micro: int, tmp_path: Path
) -> None:
    """Of neither module, whichever of them is to blame; and in the second micro-batch alone."""
    stage = make(zero, 1, {11}, bad, micro, precision=precision)
    engines, state = engines_of(stage), TrainState()
    for step in (1, 2):
        train_step(stage, engines, batches(step, micro), state, tmp_path)
    before, row = everything(engines), state.sums
    train_step(stage, engines, batches(3, micro), state, tmp_path)
    assert same(before, everything(engines))
    assert (state.step, state.skipped, state.sums) == (3, 1, row)
    train_step(stage, engines, batches(4, micro), state, tmp_path)
    after = everything(engines)
    assert all(value.isfinite().all() for value in after.values())
    assert not same(before, after)
    assert (state.step, state.skipped) == (4, 1)
    assert math.isfinite(state.pop_means()["loss"])


def test_with_offload_too(tmp_path: Path) -> None:
    for zero in (1, 2, 3):
        stage = make(zero, 1, {5}, offload=True)
        engines, state = engines_of(stage), TrainState()
        train_step(stage, engines, batches(1, 1), state, tmp_path)
        before = everything(engines)
        train_step(stage, engines, batches(2, 1), state, tmp_path)
        assert same(before, everything(engines)), zero
        train_step(stage, engines, batches(3, 1), state, tmp_path)
        assert not same(before, everything(engines)), zero


def test_one_more_than_may_be_ends_the_run_and_the_first_are_saved(tmp_path: Path) -> None:
    stage = make(0, MAX_SAVED + 1, set(range(100)), bad="discriminator", micro=2)
    engines, state = engines_of(stage), TrainState()
    for step in range(1, MAX_SAVED + 2):
        train_step(stage, engines, batches(step, 2), state, tmp_path)
    with pytest.raises(
        MachineError, match=rf"step {MAX_SAVED + 2}: a gradient is not finite; .* like {MAX_SAVED + 1} before"
    ):
        train_step(stage, engines, batches(MAX_SAVED + 2, 2), state, tmp_path)
    saved = [f"nonfinite-encoder-{step:08d}" for step in range(1, MAX_SAVED + 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == saved
    record = json.loads((tmp_path / saved[1] / "record.json").read_text())
    assert (record["stage"], record["step"], record["seed"]) == ("encoder", 2, 0)
    assert (record["world_size"], record["micro_batches"]) == (1, 2)
    assert (record["samples"], record["indices"]) == ([4, 5, 6, 7], [1004, 1005, 1006, 1007])
    norms = record["gradient_norms"]
    assert norms["discriminator.0.weight"] == "nan"
    assert 0 < norms["encoder.0.weight"] < math.inf
    layers = [f"discriminator.{name}" for name, _ in stage.nets["discriminator"].named_parameters()]
    assert record["not_finite"] == {"figures": [], "gradient_norms": layers}
    weights = load_file(tmp_path / saved[1] / "weights.safetensors")
    assert torch.equal(weights["encoder.0.weight"], stage.nets["encoder"][0].weight)


def test_none_may_be_left_out_unless_asked_for(tmp_path: Path) -> None:
    stage = make(0, 0, {0})
    with pytest.raises(MachineError, match=r"raise train_encoder\.nonfinite_skips=0"):
        train_step(stage, engines_of(stage), batches(1, 1), TrainState(), tmp_path)
    assert (tmp_path / "nonfinite-encoder-00000001" / "weights.safetensors").exists()


def test_gradient_norms_by_layer_are_those_of_the_whole(tmp_path: Path) -> None:
    norms = []
    for zero in range(4):
        stage = make(zero, 0, set(), precision=Precision.fp32)
        engine = engines_of(stage)["encoder"]
        engine.backward(stage.loss("encoder", {"encoder": engine}, batches(1, 1)[0]).loss)
        norms.append(engine.gradient_norms())
        assert engine.gradients_finite()
        assert engine.grad_norm == pytest.approx(math.hypot(*norms[-1].values()), rel=1e-5)
    assert norms[0] == norms[1] == norms[2] == norms[3]


def on_two_ranks(number: int, folder: str) -> None:
    """The second rank alone meets the poison; both leave the step out, and one bundle says what both have seen."""
    whole = None
    for zero in range(4):
        run = Path(folder) / str(zero)
        stage = make(zero, 1, {7}, precision=Precision.fp32)
        stage.nets = {"encoder": nn.Linear(6, 6)}  # no statistics: those of BatchNorm are a rank's own
        nn.init.eye_(stage.nets["encoder"].weight)
        nn.init.ones_(stage.nets["encoder"].bias)
        engines, state = engines_of(stage), TrainState()
        train_step(stage, engines, batches(1, 1, number, 2), state, run)
        before = everything(engines)
        train_step(stage, engines, batches(2, 1, number, 2), state, run)
        assert same(before, everything(engines)), zero
        assert state.skipped == 1
        ranks.barrier()
        record = json.loads((run / "nonfinite-encoder-00000002" / "record.json").read_text())
        assert record["samples"] == [4, 5, 6, 7]
        assert record["figures"] == {"loss": "nan"}
        assert record["not_finite"]["gradient_norms"] == ["encoder.weight", "encoder.bias"]
        saved = load_file(run / "nonfinite-encoder-00000002" / "weights.safetensors")
        assert saved.keys() == {"encoder.weight", "encoder.bias"}
        whole = whole or saved
        for name, value in saved.items():
            torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-7)
        engines["encoder"].backward(stage.loss("encoder", engines, batches(3, 1, number, 2)[0]).loss)
        norms = engines["encoder"].gradient_norms()
        assert engines["encoder"].gradients_finite()
        assert engines["encoder"].grad_norm == pytest.approx(math.hypot(*norms.values()), rel=1e-5), zero
        assert ranks.all_gather(norms)[0] == norms
        engines["encoder"].step(3)
        assert not same(before, everything(engines)), zero


@pytest.mark.slow
def test_two_ranks_leave_it_out_together_at_every_zero_stage(tmp_path: Path) -> None:
    on_ranks(2, on_two_ranks, tmp_path)
