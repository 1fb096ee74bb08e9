"""A Gaussian mixture fitted to the latents after training (ex-post density estimation, Ghosh et al. 2020)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.priors.base import PRIORS, Prior, log_normal
from dvae.utils import rng


class Covariance(Enum):
    """Shape of each component's covariance."""

    full = "full"
    """Any covariance: D * D numbers per component."""
    diag = "diag"
    """Independent coordinates: D numbers per component."""


@PRIORS.register("gmm")
class GMM(Prior):
    """Mixture of Gaussians on z, by expectation maximization; N(0, I) until it is fitted. Maps are flattened."""

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        components: int = 50
        """Gaussians in the mixture."""
        covariance: Covariance = Covariance.full
        """Shape of each Gaussian's covariance."""
        max_samples: int = 50_000
        """Latents used for the fit, drawn without replacement; all where there are fewer."""
        regularization: float = 1e-6
        """Added to the variances, in squared units of z."""
        fit_noise: bool = False
        """Whether to fit draws z ~ q(z|x), which cover the width of the posteriors, instead of their means."""

    weights: torch.Tensor
    means: torch.Tensor
    cholesky: torch.Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        if config.components < 1 or config.max_samples < config.components or config.regularization < 0:
            raise UserError(
                f"prior.components {config.components}, prior.max_samples {config.max_samples}, prior.regularization "
                f"{config.regularization}: give at least one component, a sample for each, and no negative number"
            )
        self.config = config
        k, d = config.components, math.prod(shapes.latent)
        unit = torch.eye(d) if config.covariance is Covariance.full else torch.ones(d)
        self.register_buffer("weights", torch.full((k,), 1.0 / k, dtype=torch.float64))
        self.register_buffer("means", torch.zeros(k, d))
        self.register_buffer("cholesky", unit.repeat(k, *[1] * unit.dim()))

    def fit(self, mean: torch.Tensor, logvar: torch.Tensor, seed: int) -> dict[str, float]:
        """Fit in float64. Returns the samples used, the mean log-likelihood in nats, iterations and convergence.

        Raises UserError where there are fewer samples than components.
        """
        config = self.config
        if len(mean) < config.components:
            raise UserError(
                f"prior gmm has {config.components} components but only {len(mean)} latents to fit: use "
                f"prior.components={max(1, len(mean) // 10)} or more images"
            )
        from sklearn.exceptions import (
            ConvergenceWarning,  # here, since that takes seconds, and a config names this file
        )
        from sklearn.mixture import GaussianMixture

        latents = self._training_latents(mean, logvar, seed)
        mixture = GaussianMixture(
            config.components,
            covariance_type=config.covariance.value,
            reg_covar=config.regularization,
            random_state=seed % 2**32,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # reported below as a figure
            mixture.fit(latents)
        covariances = mixture.covariances_
        full = config.covariance is Covariance.full
        self.weights.copy_(torch.from_numpy(mixture.weights_))
        self.means.copy_(torch.from_numpy(mixture.means_))
        self.cholesky.copy_(torch.from_numpy(np.linalg.cholesky(covariances) if full else np.sqrt(covariances)))
        return {
            "samples": float(len(latents)),
            "log_likelihood": float(mixture.score(latents)),
            "iterations": float(mixture.n_iter_),
            "converged": float(mixture.converged_),
        }

    def _training_latents(self, mean: torch.Tensor, logvar: torch.Tensor, seed: int) -> np.ndarray:
        """At most max_samples latents (n, D), float64."""
        latents = mean.detach().cpu().double().flatten(1).numpy()
        if self.config.fit_noise:
            std = np.exp(0.5 * logvar.detach().cpu().double().flatten(1).numpy())
            latents = latents + std * rng.generator(seed, "prior.noise").standard_normal(latents.shape)
        if len(latents) > self.config.max_samples:
            chosen = rng.generator(seed, "prior.samples").permutation(len(latents))[: self.config.max_samples]
            latents = latents[np.sort(chosen)]
        return latents

    def sample(self, uniform: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
        """The component by the inverse CDF of `uniform`, then its mean + L `normal`."""
        edges = torch.cumsum(self.weights, 0)
        component = torch.searchsorted(edges, uniform.to(edges) * edges[-1], right=True)
        component = component.clamp_max(len(edges) - 1)
        noise = normal.flatten(1).to(self.means)
        factor = self.cholesky[component]
        spread = torch.einsum("nij,nj->ni", factor, noise) if factor.dim() == 3 else factor * noise
        return (self.means[component] + spread).view_as(normal).to(normal.dtype)

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """In float64, one component after the other."""
        z = z.flatten(1).to(self.means.device, torch.float64)
        parts = []
        for weight, mean, factor in zip(self.weights, self.means.double(), self.cholesky.double(), strict=True):
            away = z - mean
            full = factor.dim() == 2
            e = torch.linalg.solve_triangular(factor, away.T, upper=False).T if full else away / factor
            spread = (factor.diagonal() if full else factor).log().sum()
            parts.append(weight.log() + log_normal(e) - spread)
        return torch.logsumexp(torch.stack(parts), 0)
