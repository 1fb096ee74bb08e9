"""Known pixels that a sampler keeps come back exactly, and unknown ones follow them."""

from __future__ import annotations

import pytest
import torch
from closed_forms import IO, Mixture, diffusion, integrable, normal

from dvae.diffusion.kernels import Diffusion, Matching
from dvae.inference.known_pixels import replace_known_pixels
from dvae.registry.samplers.base import SAMPLERS

STEPWISE = [case for case in integrable(("vp", "psld", "cld"), ("constant",)) if SAMPLERS.get(case[0]).lockstep]


@pytest.mark.parametrize(("name", "process", "schedule"), STEPWISE)
def test_known_pixels_come_back_exactly(name: str, process: str, schedule: str) -> None:
    mixture = Mixture(diffusion(process, schedule))
    k = mixture.diffusion.k
    sampler = SAMPLERS.build({"name": name, "steps": 6, "threshold": "none", "spacing": "uniform"}, IO)
    x0, known = normal(0, 3, 1, 4, 4), torch.rand(3, 1, 4, 4) < 0.5
    on_step = replace_known_pixels(mixture.diffusion, x0, known, lambda i: normal(100 + i, 3, k, 4, 4))
    end = sampler.sample(mixture, normal(1, 3, k, 4, 4), lambda i: normal(2 + i, 3, k, 4, 4), on_step).u
    assert torch.equal(end[:, :1][known], x0[known])
    assert not torch.isclose(end[:, :1][~known], x0[~known]).any()


@pytest.mark.parametrize("matching", list(Matching))
@pytest.mark.parametrize("process", ["vp", "psld"])
def test_known_pixels_have_the_level_just_reached(process: str, matching: Matching) -> None:
    """Mean and covariance of every component are the kernel's, the momentum drawn or marginalized alike."""
    d: Diffusion = diffusion(process, "constant", matching=matching)
    n, t, value = 200_000, 0.2, 0.7
    x0 = torch.full((1, 1, n, 1), value, dtype=torch.float64)
    known = torch.ones_like(x0, dtype=torch.bool)
    on_step = replace_known_pixels(d, x0, known, lambda i: normal(i, 1, d.k, n, 1))
    u = on_step(3, t, torch.zeros(1, d.k, n, 1, dtype=torch.float64))[0, :, :, 0]
    Phi, L = diffusion(process, "constant").marginal(t)  # hybrid: the momentum marginalized
    torch.testing.assert_close(u.mean(1), Phi[0, :, 0] * value, rtol=0, atol=0.01)
    torch.testing.assert_close(torch.cov(u).reshape(d.k, d.k), (L @ L.mT)[0], rtol=0, atol=0.01)
