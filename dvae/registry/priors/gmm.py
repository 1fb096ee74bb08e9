"""A Gaussian mixture that is fitted to the latents after training.

This is the ex-post density estimation of Ghosh et al. 2020.
"""

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
    """Full covariance matrix: D * D numbers per component."""
    diag = "diag"
    """Diagonal covariance (independent coordinates): D numbers per component."""


@PRIORS.register("gmm")
class GMM(Prior):
    """Mixture of Gaussians on z, fitted by expectation maximization.

    The prior is N(0, I) until it is fitted. Latents that are maps are flattened.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        components: int = 50
        """Number of Gaussians in the mixture."""
        covariance: Covariance = Covariance.full
        """Shape of each Gaussian's covariance."""
        max_samples: int = 50_000
        """Most latents used for the fit. If there are more, a random subset of this size is used."""
        regularization: float = 1e-6
        """Constant that is added to the variances, in squared units of z; 0 or more."""
        fit_noise: bool = False
        """Fit samples z ~ q(z|x) instead of the posterior means. Samples include the spread of the posteriors."""

    weights: torch.Tensor
    means: torch.Tensor
    cholesky: torch.Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        if config.components < 1 or config.max_samples < config.components or config.regularization < 0:
            raise UserError(
                f"prior.components {config.components}, prior.max_samples {config.max_samples}, prior.regularization "
                f"{config.regularization}: use components >= 1, max_samples >= components and regularization >= 0"
            )
        self.config = config
        k, d = config.components, math.prod(shapes.latent)
        unit = torch.eye(d) if config.covariance is Covariance.full else torch.ones(d)
        self.register_buffer("weights", torch.full((k,), 1.0 / k, dtype=torch.float64))
        self.register_buffer("means", torch.zeros(k, d))
        self.register_buffer("cholesky", unit.repeat(k, *[1] * unit.dim()))

    def fit(self, mean: torch.Tensor, logvar: torch.Tensor, seed: int) -> dict[str, float]:
        """Fit the mixture in float64.

        Returns the number of samples used, the mean log-likelihood in nats, the number of iterations, and whether the
        fit converged (1.0 or 0.0). Raises UserError if there are fewer latents than components.
        """
        config = self.config
        if len(mean) < config.components:
            raise UserError(
                f"prior gmm has {config.components} components but only {len(mean)} latents to fit: use "
                f"prior.components={max(1, len(mean) // 10)} or more images"
            )
        # Imported here, because the import takes seconds, and every config of this prior imports this file.
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        latents = self._training_latents(mean, logvar, seed)
        mixture = GaussianMixture(
            config.components,
            covariance_type=config.covariance.value,
            reg_covar=config.regularization,
            random_state=seed % 2**32,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the result "converged" below reports it
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
        """Return at most max_samples latents (n, D), float64."""
        latents = mean.detach().cpu().double().flatten(1).numpy()
        if self.config.fit_noise:
            std = np.exp(0.5 * logvar.detach().cpu().double().flatten(1).numpy())
            latents = latents + std * rng.generator(seed, "prior.noise").standard_normal(latents.shape)
        if len(latents) > self.config.max_samples:
            chosen = rng.generator(seed, "prior.samples").permutation(len(latents))[: self.config.max_samples]
            latents = latents[np.sort(chosen)]
        return latents

    def sample(self, uniform: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
        """Choose a component with the inverse CDF at `uniform`, and return its mean + L `normal`.

        L is the Cholesky factor of the component's covariance.
        """
        edges = torch.cumsum(self.weights, 0)
        # edges[-1] may differ from 1 by rounding, so uniform is scaled by it; the clamp guards the upper edge
        component = torch.searchsorted(edges, uniform.to(edges) * edges[-1], right=True)
        component = component.clamp_max(len(edges) - 1)
        noise = normal.flatten(1).to(self.means)
        factor = self.cholesky[component]
        spread = torch.einsum("nij,nj->ni", factor, noise) if factor.dim() == 3 else factor * noise
        return (self.means[component] + spread).view_as(normal).to(normal.dtype)

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        """Return log p(z) (n,) in nats, float64. The components are computed one after the other."""
        z = z.flatten(1).to(self.means.device, torch.float64)
        parts = []
        for weight, mean, factor in zip(self.weights, self.means.double(), self.cholesky.double(), strict=True):
            away = z - mean
            full = factor.dim() == 2
            e = torch.linalg.solve_triangular(factor, away.T, upper=False).T if full else away / factor
            spread = (factor.diagonal() if full else factor).log().sum()
            parts.append(weight.log() + log_normal(e) - spread)
        return torch.logsumexp(torch.stack(parts), 0)
