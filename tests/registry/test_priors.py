from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from scipy.stats import multivariate_normal

from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.priors.base import PRIORS, Prior

MEANS = torch.tensor([[-4.0, 0.0], [4.0, 1.0]])
FACTORS = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.3, 0.0], [-0.2, 1.0]]])  # Cholesky factors
WEIGHTS = torch.tensor([0.25, 0.75])


def gmm(latent: tuple[int, ...] = (2,), **fields: object) -> Prior:
    return PRIORS.build({"name": "gmm", **fields}, Shapes(image_size=8, latent=latent))


def draws(n: int, *shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, generator=generator, dtype=torch.float64), torch.randn(n, *shape, generator=generator)


def known_mixture(n: int) -> torch.Tensor:
    uniform, normal = draws(n, 2, seed=7)
    component = (uniform > WEIGHTS[0]).long()
    return MEANS[component] + torch.einsum("nij,nj->ni", FACTORS[component], normal)


@pytest.mark.parametrize("name", PRIORS.names())
def test_every_prior_samples_any_latent_shape(name):
    for latent in [(6,), (2, 3, 3)]:
        prior = PRIORS.build({"name": name}, Shapes(image_size=8, latent=latent))
        uniform, normal = draws(5, *latent)
        z = prior.sample(uniform, normal)
        assert z.shape == normal.shape
        assert z.dtype == torch.float32
        assert torch.equal(z, prior.sample(uniform, normal))
        torch.testing.assert_close(z[2:3], prior.sample(uniform[2:3], normal[2:3]))  # does not depend on the batch


@pytest.mark.parametrize("name", PRIORS.names())
def test_every_prior_is_standard_normal_before_its_fit_and_says_so(name):
    for latent in [(6,), (2, 3, 3)]:
        prior = PRIORS.build({"name": name}, Shapes(image_size=8, latent=latent))
        _, z = draws(5, *latent)
        found = prior.log_prob(z)
        assert found.dtype == torch.float64
        expected = multivariate_normal(np.zeros(z[0].numel())).logpdf(z.flatten(1))
        torch.testing.assert_close(found, torch.from_numpy(expected))


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_gmm_log_prob_is_that_of_its_mixture(covariance):
    data = known_mixture(500)
    prior = gmm(components=2, covariance=covariance)
    figures = prior.fit(data, torch.zeros_like(data), seed=3)
    factors = prior.cholesky if covariance == "full" else torch.diag_embed(prior.cholesky)
    parts = [
        weight.item() * multivariate_normal(mean, factor @ factor.T).pdf(data)
        for weight, mean, factor in zip(prior.weights, prior.means, factors.double(), strict=True)
    ]
    torch.testing.assert_close(prior.log_prob(data), torch.from_numpy(np.log(sum(parts))), rtol=1e-6, atol=1e-6)
    assert figures["log_likelihood"] == pytest.approx(float(prior.log_prob(data).mean()), abs=1e-3)


@pytest.mark.parametrize("name", PRIORS.names())
def test_every_prior_survives_yaml(name):
    config = PRIORS.config({"name": name})
    assert PRIORS.config(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.structured(config)))) == config


def test_normal_is_the_noise():
    prior = PRIORS.build({"name": "normal"}, Shapes(image_size=8, latent=(3,)))
    uniform, normal = draws(4, 3)
    assert prior.fit(normal, normal, seed=0) == {}
    assert torch.equal(prior.sample(uniform, normal), normal)


def test_unfitted_gmm_is_standard_normal():
    uniform, normal = draws(4, 2)
    torch.testing.assert_close(gmm().sample(uniform, normal), normal)


def test_gmm_recovers_a_known_mixture():
    data = known_mixture(8000)
    prior = gmm(components=2)
    figures = prior.fit(data, torch.zeros_like(data), seed=3)
    order = prior.means[:, 0].argsort()
    torch.testing.assert_close(prior.weights[order].float(), WEIGHTS, rtol=0, atol=0.02)
    torch.testing.assert_close(prior.means[order], MEANS, rtol=0, atol=0.08)
    torch.testing.assert_close(prior.cholesky[order], FACTORS, rtol=0, atol=0.08)
    parts = [multivariate_normal(MEANS[i], FACTORS[i] @ FACTORS[i].T).pdf(data) * WEIGHTS[i].item() for i in (0, 1)]
    assert figures["log_likelihood"] == pytest.approx(float(np.log(sum(parts)).mean()), abs=0.02)
    assert figures["samples"] == 8000
    assert figures["converged"] == 1


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_gmm_samples_have_the_moments_of_the_data(covariance):
    data = known_mixture(8000)
    prior = gmm(components=2, covariance=covariance)
    prior.fit(data, torch.zeros_like(data), seed=3)
    z = prior.sample(*draws(20000, 2))
    torch.testing.assert_close(z.mean(0), data.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(z.var(0), data.var(0), rtol=0.05, atol=0)
    if covariance == "full":
        torch.testing.assert_close(z.T.cov(), data.T.cov(), rtol=0.05, atol=0.1)


def test_component_is_the_inverse_cdf():
    prior = gmm(components=2)
    prior.means.copy_(MEANS)
    prior.weights.copy_(WEIGHTS)
    uniform = torch.tensor([0.0, 0.2499, 0.2501, 1.0 - 2**-53], dtype=torch.float64)
    z = prior.sample(uniform, torch.zeros(4, 2))
    torch.testing.assert_close(z, MEANS[[0, 0, 1, 1]])


def test_fit_noise_adds_the_width_of_the_posteriors():
    mean, logvar = torch.zeros(4000, 3), torch.full((4000, 3), float(np.log(4.0)))
    narrow, wide = gmm((3,), components=1), gmm((3,), components=1, fit_noise=True)
    narrow.fit(mean, logvar, seed=0)
    wide.fit(mean, logvar, seed=0)
    assert narrow.cholesky.abs().max() < 0.01
    torch.testing.assert_close(wide.cholesky[0].diagonal(), torch.full((3,), 2.0), rtol=0.05, atol=0)


def test_fit_is_keyed_and_capped():
    data = known_mixture(500)
    first, again, other = (gmm(components=2, max_samples=100) for _ in range(3))
    assert first.fit(data, data, seed=1)["samples"] == 100
    again.fit(data, data, seed=1)
    other.fit(data, data, seed=2)
    assert torch.equal(first.means, again.means)
    assert not torch.equal(first.means, other.means)


@pytest.mark.parametrize("covariance", ["full", "diag"])
def test_state_dict_carries_the_fit(covariance):
    data = torch.randn(300, 2, 2, 2)
    fitted, fresh = (gmm((2, 2, 2), components=3, covariance=covariance) for _ in range(2))
    fitted.fit(data, data, seed=0)
    fresh.load_state_dict(fitted.state_dict(), strict=True)
    uniform, normal = draws(6, 2, 2, 2)
    assert torch.equal(fresh.sample(uniform, normal), fitted.sample(uniform, normal))


def test_refuses_in_one_line():
    with pytest.raises(UserError, match="50 components but only 20 latents"):
        gmm().fit(torch.randn(20, 2), torch.zeros(20, 2), seed=0)
    with pytest.raises(UserError, match="components 0"):
        gmm(components=0)
