"""The probability flow with adaptive steps: the exact map of Gaussian data, and samples that ignore their batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from closed_forms import Mixture, normal
from linear_gaussian import CASES, MEAN, VARIANCE, build, exact_images


@pytest.mark.parametrize("case", ["vp linear", "vp ddpm_linear", "psld", "cld", "underdamped", "third order"])
def test_ode_is_the_exact_flow(case: str) -> None:
    d = CASES[case]
    u = d.sample_prior(normal(0, 6, d.k, 1, 1))
    end = build("ode", d.k, tolerance=1e-5).sample(Mixture(d, (MEAN,), (VARIANCE,)), u, normal)
    np.testing.assert_allclose(end.u[:, 0, 0, 0], exact_images(d, u, 1e-3), atol=1e-4)


def test_nfe_falls_with_the_tolerance() -> None:
    d, u = CASES["psld"], CASES["psld"].sample_prior(normal(0, 4, 2, 1, 1))
    exact, nfe, error = exact_images(d, u, 1e-3), [], []
    for tolerance in (1e-6, 1e-4, 1e-2):
        end = build("ode", 2, tolerance=tolerance).sample(Mixture(d, (MEAN,), (VARIANCE,)), u, normal)
        nfe.append(end.nfe.double().mean().item())
        error.append(np.abs(end.u[:, 0, 0, 0].numpy() - exact).max())
    assert nfe == sorted(nfe, reverse=True)
    assert nfe[0] > 2.5 * nfe[-1]
    assert error == sorted(error)


class RecordingDenoiser(Mixture):
    """Counts the samples it is given, and which of the batch they were."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.evaluated = torch.zeros(0, dtype=torch.int64)
        self.rows = torch.arange(0)

    def __getitem__(self, rows: torch.Tensor) -> RecordingDenoiser:
        self.rows = rows
        return self

    def __call__(self, u: torch.Tensor, t, **more):
        assert len(u) == len(self.rows)
        self.evaluated = self.evaluated + torch.bincount(self.rows, minlength=len(self.evaluated))
        return super().__call__(u, t, **more)


@pytest.mark.parametrize("case", ["vp linear", "psld"])
def test_a_sample_does_not_feel_its_batch(case: str) -> None:
    """Result and NFE are the same to the last bit; a sample that has arrived is evaluated no more."""
    d, shape = CASES[case], (3 * CASES[case].k, 2, 2)
    # of different difficulty: starts far out take more steps
    u = d.sample_prior(
        normal(0, 5, *shape) * torch.tensor([0.1, 1.0, 1.0, 4.0, 40.0], dtype=torch.float64).view(-1, 1, 1, 1)
    )
    two_modes = (d, (-0.6, 0.5), (0.001, 0.04), (0.4, 0.6))
    watched = RecordingDenoiser(*two_modes)
    watched.rows, watched.evaluated = torch.arange(5), torch.zeros(5, dtype=torch.int64)

    ode = build("ode", d.k, tolerance=1e-3)
    whole = ode.sample(Mixture(*two_modes), u, normal)
    assert len(set(whole.nfe.tolist())) > 1
    for part in ([3], [4, 0]):
        alone = ode.sample(Mixture(*two_modes), u[part], normal)
        assert torch.equal(alone.u, whole.u[part])
        assert torch.equal(alone.nfe, whole.nfe[part])

    first = watched.evaluated
    integrated = ode.sample(_Resting(watched), u, normal)
    assert torch.equal(integrated.nfe, whole.nfe)
    assert torch.equal(watched.evaluated - first, whole.nfe)


class _Resting:
    """A Model whose batch is whole again where it is called without `rows`: the final denoising evaluation."""

    def __init__(self, watched: RecordingDenoiser) -> None:
        self.watched, self.diffusion, self.nfe_per_call = watched, watched.diffusion, 1

    def __getitem__(self, rows: torch.Tensor) -> RecordingDenoiser:
        return self.watched[rows]

    def __call__(self, u: torch.Tensor, t, **more):
        return self.watched[torch.arange(len(u))](u, t, **more)


def test_ode_counts_guidance_and_calls_on_step_at_both_ends() -> None:
    d, seen = CASES["vp linear"], []
    u = normal(0, 2, 1, 1, 1)

    def look(i: int, t: float, state: torch.Tensor) -> torch.Tensor:
        seen.append((i, t))
        return state

    once = build("ode").sample(Mixture(d), u, normal, look)
    twice = build("ode").sample(Mixture(d, nfe_per_call=2), u, normal)
    assert torch.equal(2 * once.nfe, twice.nfe)
    assert seen == [(0, 1.0), (1, 0.0)]
    assert not build("ode").lockstep
