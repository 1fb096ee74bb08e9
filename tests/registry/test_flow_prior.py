"""The flow prior: exact inverse, a density that integrates to one, fits with known answers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.priors.base import PRIORS, Prior

SMALL = {"couplings": 4, "width": 32, "steps": 400, "lr": 5e-3, "check_every": 50, "batch": 128}


def flow(latent: tuple[int, ...] = (2,), **fields: object) -> Prior:
    return PRIORS.build({"name": "flow", **SMALL, **fields}, Shapes(image_size=8, latent=latent))


def stirred(latent: tuple[int, ...] = (2,), seed: int = 0, **fields: object) -> Prior:
    """A flow with weights far from the identity, on latents of another place and spread than N(0, I)."""
    prior, draw = flow(latent, **fields), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    d = math.prod(latent)
    prior.center.copy_(torch.randn(d, generator=draw))
    prior.factor.copy_(torch.eye(d) * 0.7 + 0.3 * torch.randn(d, d, generator=draw).tril(-1))
    prior.order.copy_(torch.stack([torch.randperm(d, generator=draw) for _ in prior.order]))
    return prior


def crescents(n: int, seed: int) -> torch.Tensor:
    """Two half circles that reach into each other, with noise of 0.1."""
    draw = torch.Generator().manual_seed(seed)
    angle, noise = math.pi * torch.rand(n, generator=draw), 0.1 * torch.randn(n, 2, generator=draw)
    upper = torch.stack([angle.cos(), angle.sin()], 1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], 1)
    return torch.where(torch.arange(n)[:, None] % 2 == 0, upper, lower) + noise


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([(2,), (3,), (7,), (2, 3, 3)]), st.integers(0, 1000))
def test_sampling_inverts_the_flow(latent: tuple[int, ...], seed: int) -> None:
    """Exactly but for rounding, which so wild a flow magnifies: in float64 to 1.3e-8 at the worst of these seeds."""
    prior = stirred(latent, seed).double()
    normal = torch.randn(16, *latent, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z = prior.sample(torch.rand(16), normal)
    torch.testing.assert_close(prior.to_noise(z), normal, rtol=0, atol=1e-6)
    assert z.shape == normal.shape
    assert (z - normal).abs().max() > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_the_density_integrates_to_one(seed: int) -> None:
    prior = stirred(seed=seed)
    z = prior.sample(torch.rand(4000), torch.randn(4000, 2, generator=torch.Generator().manual_seed(seed)))
    low, high = z.amin(0) - 3, z.amax(0) + 3
    axes = [torch.linspace(float(a), float(b), 500) for a, b in zip(low, high, strict=True)]
    cell = math.prod(float(axis[1] - axis[0]) for axis in axes)
    grid = torch.cartesian_prod(*axes)
    assert float(prior.log_prob(grid).exp().sum() * cell) == pytest.approx(1.0, abs=0.01)


def test_the_density_is_that_of_the_samples() -> None:
    """log p(z) = log N(e) - log |dz/de|, the determinant by differentiating `noise_of` numerically."""
    prior = stirred((3,)).double()
    e = torch.randn(1, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    z = prior.sample(torch.rand(1), e)
    step = 1e-6
    columns = [
        (prior.to_noise(z + step * row) - prior.to_noise(z - step * row))[0] / (2 * step) for row in torch.eye(3)
    ]
    volume = torch.linalg.slogdet(torch.stack(columns, 1))[1]
    expected = multivariate_normal(torch.zeros(3)).logpdf(e[0]) + float(volume)
    assert float(prior.log_prob(z)) == pytest.approx(expected, abs=1e-6)


def test_before_the_fit_it_is_standard_normal() -> None:
    prior, normal = flow((2, 2, 2)), torch.randn(5, 2, 2, 2)
    torch.testing.assert_close(prior.sample(torch.rand(5), normal), normal)
    expected = multivariate_normal(torch.zeros(8)).logpdf(normal.flatten(1))
    torch.testing.assert_close(prior.log_prob(normal), torch.from_numpy(expected))


def test_correlated_gaussian_reaches_the_entropy() -> None:
    """Held-out log-likelihood of N(m, S) is -(D + D log 2 pi + log det S) / 2, and no density has more."""
    draw = torch.Generator().manual_seed(3)
    factor = torch.randn(4, 4, generator=draw).tril() + 2 * torch.eye(4)
    data = torch.randn(6000, 4, generator=draw) @ factor.T + 1.0
    prior = flow((4,), steps=100)
    prior.fit(data[:4000], torch.full_like(data[:4000], -40.0), seed=0)
    entropy = 0.5 * (4 + 4 * math.log(2 * math.pi)) + float(factor.diagonal().log().sum())
    held = prior.log_prob(data[4000:])
    assert float(held.mean()) == pytest.approx(-entropy, abs=3 * float(held.std()) / math.sqrt(2000) + 0.02)


@pytest.fixture(scope="module")
def bent() -> tuple[Prior, dict[str, float]]:
    """A flow fitted to crescents."""
    prior, data = flow(couplings=6), crescents(4000, seed=0)
    return prior, prior.fit(data, torch.full_like(data, -40.0), seed=5)


def test_crescents_are_beyond_any_gaussian(bent: tuple[Prior, dict[str, float]]) -> None:
    prior, figures = bent
    data, held = crescents(4000, seed=0).double(), crescents(2000, seed=1)
    gaussian = multivariate_normal(data.mean(0), data.T.cov()).logpdf(held).mean()
    assert figures["log_likelihood_gaussian"] == pytest.approx(gaussian, abs=0.1)
    assert float(prior.log_prob(held).mean()) > gaussian + 0.5
    assert figures["log_likelihood"] > figures["log_likelihood_gaussian"] + 0.5
    z = prior.sample(torch.rand(4000), torch.randn(4000, 2, generator=torch.Generator().manual_seed(9)))
    again = prior.to_noise(held)
    torch.testing.assert_close(prior.sample(torch.rand(2000), again), held, rtol=0, atol=1e-5)
    nearest = torch.cdist(z, held).amin(1)
    assert float((nearest < 0.15).float().mean()) > 0.9


def test_the_fit_is_keyed_and_in_the_state_dict(bent: tuple[Prior, dict[str, float]]) -> None:
    data = crescents(400, seed=0)
    first, again, other = (flow(steps=20) for _ in range(3))
    for prior, seed in ((first, 1), (again, 1), (other, 2)):
        torch.rand(seed)  # the surrounding generator plays no part
        prior.fit(data, torch.full_like(data, -2.0), seed=seed)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    assert not torch.equal(first.couplings[0].net[0].weight, other.couplings[0].net[0].weight)
    fresh = flow(couplings=6)
    fresh.load_state_dict(bent[0].state_dict(), strict=True)
    normal = torch.randn(6, 2)
    assert torch.equal(fresh.sample(torch.rand(6), normal), bent[0].sample(torch.rand(6), normal))


def test_a_useless_training_is_taken_back() -> None:
    """With a learning rate that destroys it, what is left is the Gaussian that it started from."""
    data = torch.randn(500, 3, generator=torch.Generator().manual_seed(4)) + 2.0
    prior = flow((3,), lr=10.0, steps=50)
    figures = prior.fit(data, torch.full_like(data, -40.0), seed=0)
    assert figures["step"] == 0
    assert figures["log_likelihood"] == figures["log_likelihood_gaussian"]
    assert torch.isfinite(prior.log_prob(data)).all()


def test_fit_noise_covers_the_width_of_the_posteriors() -> None:
    mean, logvar = torch.randn(3000, 3, generator=torch.Generator().manual_seed(6)), torch.full((3000, 3), math.log(3))
    wide, narrow = flow((3,), steps=5), flow((3,), steps=5, fit_noise=False)
    for prior, variance in ((wide, 4.0), (narrow, 1.0)):
        prior.fit(mean, logvar, seed=0)
        z = prior.sample(torch.rand(4000), torch.randn(4000, 3, generator=torch.Generator().manual_seed(7)))
        torch.testing.assert_close(z.var(0), torch.full((3,), variance), rtol=0.12, atol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"couplings": 3}, r"prior\.couplings=3: use an even number"),
        ({"steps": 0}, r"prior\.steps=0: use 1 or more"),
        ({"lr": 0.0}, r"prior\.lr=0\.0: must be above 0"),
        ({"validation": 1.0}, r"prior\.validation=1\.0: must be above 0 and below 1"),
        ({"regularization": -1.0}, r"prior\.regularization=-1\.0: use 0 or more"),
    ],
)
def test_refuses_fields(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        flow(**fields)


def test_refuses_too_little() -> None:
    with pytest.raises(UserError, match="this latent has 1: use prior=gmm or normal"):
        flow((1,))
    with pytest.raises(UserError, match="5 latents are too few to whiten 3 coordinates: use 6 or more images"):
        flow((3,)).fit(torch.randn(5, 3), torch.zeros(5, 3), seed=0)
