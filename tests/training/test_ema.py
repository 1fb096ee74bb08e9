"""The moving averages against their definition, on one process and cut among two; the profile against its width."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from spawned_ranks import on_ranks

from dvae.config.schema import EmaConfig, EmaProfile, Precision, TrainingConfig
from dvae.training.engine.deepspeed_engine import Engine, start_distributed
from dvae.training.engine.ema import MAIN, AdamWEma, ema_decays, ema_names, ema_specs
from dvae.training.resilience import ranks


def weights_of_past(config: EmaConfig, steps: int) -> np.ndarray:
    """Weight that step i has in the average after `steps` steps."""
    weights = np.zeros(steps)
    for step in range(1, steps + 1):
        decay = ema_specs(config)[MAIN].decay(step)
        weights *= decay
        weights[step - 1] = 1.0 - decay
    return weights


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_power_profile_has_its_width(width: float) -> None:
    steps = 4000
    weights = weights_of_past(EmaConfig(profile=EmaProfile.power, width=width), steps)
    assert weights.sum() == pytest.approx(1.0)
    times = np.arange(1, steps + 1) / steps
    mean = (weights * times).sum()
    assert np.sqrt((weights * (times - mean) ** 2).sum()) == pytest.approx(width, rel=2e-2)


def test_constant_profile_forgets_the_start() -> None:
    config = EmaConfig(decay=0.99)
    assert ema_decays(config, 1) == {MAIN: pytest.approx(2 / 11)}
    assert ema_decays(config, 10_000) == {MAIN: 0.99}


def test_names_are_of_states_and_the_exported_one_is_first() -> None:
    config = EmaConfig(decay=0.9, extra_widths=[0.05, 0.1], extra_decays=[0.5])
    assert ema_names(config) == ["ema", "ema_1", "ema_2", "ema_3"]
    late = ema_decays(config, 10**6)
    assert (late["ema"], late["ema_3"]) == (0.9, 0.5)
    assert 1 - late["ema_1"] > 1 - late["ema_2"] > 0  # the narrower forgets sooner


def test_averages_and_adamw_equal_their_definitions() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = AdamWEma(ours.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    config = EmaConfig(extra_widths=[0.05, 0.2], extra_decays=[0.5])
    expected: dict[str, torch.Tensor] = {}
    for step in range(1, 20):
        optimizer.param_groups[0]["ema_decays"] = decays = ema_decays(config, step)
        x = torch.randn(8, 4)
        for module, each in ((ours, optimizer), (theirs, reference)):
            module.zero_grad()
            module(x).square().mean().backward()
            each.step()
        weight = theirs.weight.detach()
        for name, decay in decays.items():
            expected[name] = decay * expected.get(name, weight) + (1 - decay) * weight
    torch.testing.assert_close(ours.weight, theirs.weight)
    for name in ema_names(config):
        torch.testing.assert_close(optimizer.state[ours.weight][name], expected[name])
    assert not torch.allclose(expected["ema_1"], expected["ema_2"])


def test_a_step_that_overflowed_changes_nothing() -> None:
    module = torch.nn.Linear(2, 2)
    before = module.weight.detach().clone()
    optimizer = AdamWEma(module.parameters(), lr=1.0, betas=(0.9, 0.999), weight_decay=0.0)
    module(torch.full((1, 2), torch.nan)).sum().backward()
    optimizer.overflow = True
    optimizer.step()
    assert torch.equal(module.weight, before)
    assert not optimizer.state


SEVERAL = EmaConfig(decay=0.5, extra_widths=[0.05, 0.1], extra_decays=[0.9])
STEPS = 6


def averaged(zero_stage: int) -> tuple[Engine, dict[str, dict[str, torch.Tensor]]]:
    """An engine after some steps on batches of 4, of which each rank takes its share, and all averages."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.SiLU(), torch.nn.Linear(8, 6))
    config = TrainingConfig(batch=4, lr=1e-2, warmup=0, precision=Precision.fp32, ema=SEVERAL, zero_stage=zero_stage)
    engine = Engine(module, config)
    for number in range(1, STEPS + 1):
        batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
        x = batch.chunk(ranks.world_size())[ranks.rank()]
        engine.backward((engine(x) - x).square().mean())
        assert engine.step(number)
    return engine, {name: engine.averaged_weights(name) for name in ema_names(SEVERAL)}


def on_two(number: int, folder: Path) -> None:
    """A rank: leaves what is kept at each ZeRO stage, and its part of a checkpoint at stage 2."""
    for stage in range(4):
        engine, kept = averaged(stage)
        if number == 0:
            torch.save(kept, folder / f"zero-{stage}.pt")
        if stage == 2:
            held = {name: sum(state[name].numel() for state in engine.optimizer.state.values()) for name in kept}
            assert max(held.values()) <= sum(p.numel() for p in engine.module.parameters()) / 2 + 8, held
            engine.snapshot().write(folder / f"rank-{number:05d}.safetensors")


@pytest.mark.slow
def test_two_ranks_keep_the_averages_of_one_at_every_zero_stage(tmp_path: Path) -> None:
    on_ranks(2, on_two, tmp_path)
    start_distributed()
    engine, alone = averaged(0)
    for stage in range(4):
        together = torch.load(tmp_path / f"zero-{stage}.pt", weights_only=True)
        assert together.keys() == alone.keys() == {"ema", "ema_1", "ema_2", "ema_3"}
        for name, state in alone.items():
            for key, value in state.items():
                torch.testing.assert_close(together[name][key], value, rtol=1e-4, atol=1e-6)
    engine.load(tmp_path)  # from two ranks at stage 2 to one at stage 0
    together = torch.load(tmp_path / "zero-2.pt", weights_only=True)
    for name, state in together.items():
        for key, value in state.items():
            assert torch.equal(engine.averaged_weights(name)[key], value), (name, key)
