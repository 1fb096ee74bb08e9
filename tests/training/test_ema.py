"""The moving average against its definition, and the power profile against its stated width."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dvae.settings import EmaConfig, EmaProfile
from dvae.training.ema import AdamWEma, ema_decay


def weights_of_past(config: EmaConfig, steps: int) -> np.ndarray:
    """Weight that step i has in the average after `steps` steps."""
    weights = np.zeros(steps)
    for step in range(1, steps + 1):
        decay = ema_decay(config, step)
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
    assert ema_decay(config, 1) == pytest.approx(2 / 11)
    assert ema_decay(config, 10_000) == 0.99


def test_average_and_adamw_equal_their_definitions() -> None:
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizer = AdamWEma(ours.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    average: torch.Tensor | None = None
    for step in range(1, 20):
        optimizer.param_groups[0]["ema_decay"] = decay = ema_decay(EmaConfig(), step)
        x = torch.randn(8, 4)
        for module, each in ((ours, optimizer), (theirs, reference)):
            module.zero_grad()
            module(x).square().mean().backward()
            each.step()
        weight = theirs.weight.detach()
        average = weight.clone() if average is None else decay * average + (1 - decay) * weight
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(optimizer.state[ours.weight]["ema"], average)


def test_a_step_that_overflowed_changes_nothing() -> None:
    module = torch.nn.Linear(2, 2)
    before = module.weight.detach().clone()
    optimizer = AdamWEma(module.parameters(), lr=1.0, betas=(0.9, 0.999), weight_decay=0.0)
    module(torch.full((1, 2), torch.nan)).sum().backward()
    optimizer.overflow = True
    optimizer.step()
    assert torch.equal(module.weight, before)
    assert not optimizer.state
