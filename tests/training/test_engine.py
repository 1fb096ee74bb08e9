"""The engine on one process, at every ZeRO stage: average, resume bit for bit, non-finite steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dvae.config.schema import Decay, EmaConfig, Precision, TrainingConfig
from dvae.errors import MachineError
from dvae.training.engine.deepspeed_engine import Engine, learning_rate, start_distributed

STAGES = [0, 1, 2, 3]


@pytest.fixture(autouse=True, scope="module")
def _distributed() -> None:
    start_distributed()


def make(stage: int, **more: object) -> Engine:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 6))
    settings = {"batch": 4, "lr": 1e-2, "warmup": 2, "ema": EmaConfig(decay=0.5)} | more
    return Engine(module, TrainingConfig(zero_stage=stage, **settings))


def steps(engine: Engine, first: int, last: int, micro: int = 1) -> list[float]:
    losses = []
    for number in range(first, last + 1):
        for part in range(micro):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(number * 10 + part))
            loss = (engine(x) - x).square().mean()
            engine.backward(loss)
            assert engine.step(number)
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", list(Precision))
def test_resume_is_bit_for_bit(stage: int, precision: Precision, tmp_path: Path) -> None:
    whole = make(stage, precision=precision)
    expected = steps(whole, 1, 8)
    first = make(stage, precision=precision)
    steps(first, 1, 5)
    first.snapshot().write(tmp_path / "rank.safetensors")
    second = make(stage, precision=precision)
    second.load(tmp_path)
    assert steps(second, 6, 8) == expected[5:]
    for name, value in whole.averaged_weights().items():
        assert torch.equal(value, second.averaged_weights()[name]), name
    assert second.grad_norm == whole.grad_norm > 0


@pytest.mark.parametrize("other", STAGES)
@pytest.mark.parametrize("stage", STAGES)
def test_another_stage_takes_up_every_value(stage: int, other: int, tmp_path: Path) -> None:
    first = make(stage)
    steps(first, 1, 3)
    first.snapshot().write(tmp_path / "rank.safetensors")
    second = make(other)
    steps(second, 1, 1)  # values of its own, to be replaced
    second.load(tmp_path)
    ours, theirs = first.snapshot().tensors, second.snapshot().tensors
    assert ours.keys() == theirs.keys()
    assert {key.partition(":")[0] for key in ours} == {"weight", "exp_avg", "exp_avg_sq", "ema"}
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key
    assert steps(first, 4, 6) == pytest.approx(steps(second, 4, 6), rel=1e-4)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    make(0).snapshot().write(tmp_path / "rank.safetensors")
    other = Engine(nn.Sequential(nn.Linear(6, 6)), TrainingConfig(batch=4))
    with pytest.raises(MachineError, match=r"'2\.bias' is not in both"):
        other.load(tmp_path)
    with pytest.raises(MachineError, match="no engine state"):
        other.load(tmp_path / "empty")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_optimizer_on_the_host_takes_the_same_steps(stage: int, tmp_path: Path) -> None:
    plain, offloaded = make(stage), make(stage, offload=True)
    assert steps(plain, 1, 3) == steps(offloaded, 1, 3)
    offloaded.snapshot().write(tmp_path / "rank.safetensors")
    again = make(stage, offload=True)
    again.load(tmp_path)
    assert steps(again, 4, 5) == steps(plain, 4, 5)


@pytest.mark.parametrize("stage", STAGES)
def test_stages_agree_and_the_average_is_one(stage: int) -> None:
    plain, other = make(0, precision=Precision.fp32), make(stage, precision=Precision.fp32)
    assert steps(plain, 1, 5) == pytest.approx(steps(other, 1, 5), rel=1e-5)
    for name, value in plain.averaged_weights().items():
        torch.testing.assert_close(value, other.averaged_weights()[name], rtol=1e-4, atol=1e-6)
    weights = dict(plain.module.state_dict())
    assert not torch.allclose(weights["0.weight"], plain.averaged_weights()["0.weight"])


@pytest.mark.parametrize("stage", STAGES)
def test_before_the_first_step_the_average_is_the_weights(stage: int) -> None:
    engine = make(stage)
    for name, value in make(0).module.state_dict().items():
        assert torch.equal(engine.averaged_weights()[name], value), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_non_finite_step_is_left_out(stage: int) -> None:
    engine = make(stage)
    steps(engine, 1, 2)
    before = engine.averaged_weights()
    engine.backward((engine(torch.full((4, 6), torch.nan))).mean())
    assert not engine.step(3)
    for name, value in engine.averaged_weights().items():
        assert torch.equal(value, before[name]), name
    assert all(loss == loss for loss in steps(engine, 4, 5))


def test_accumulated_micro_batches_are_one_step() -> None:
    engine = make(0, micro_batches=2, batch=8, precision=Precision.fp32)
    plain = make(0, batch=8, precision=Precision.fp32)
    steps(engine, 1, 3, micro=2)
    for number in range(1, 4):
        parts = [torch.randn(4, 6, generator=torch.Generator().manual_seed(number * 10 + p)) for p in (0, 1)]
        x = torch.cat(parts)
        plain.backward((plain(x) - x).square().mean())
        assert plain.step(number)
    torch.testing.assert_close(
        engine.averaged_weights()["0.weight"], plain.averaged_weights()["0.weight"], rtol=1e-5, atol=1e-7
    )


def test_learning_rate_is_a_function_of_the_step() -> None:
    config = TrainingConfig(steps=100, warmup=10, lr=1.0, lr_decay=Decay.cosine)
    assert [learning_rate(config, step) for step in (1, 10, 55, 100)] == pytest.approx([0.1, 1.0, 0.5, 0.0])
    assert learning_rate(TrainingConfig(warmup=0, lr=3.0), 1) == 3.0
