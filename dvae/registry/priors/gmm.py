"""Ex-post density estimation: a Gaussian mixture in place of N(0, I) (Ghosh et al. 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from sklearn.mixture import GaussianMixture

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.priors import PRIORS, Prior


class Covariance(Enum):
    """Shape of each component."""

    full = "full"
    diag = "diag"


@PRIORS.register("gmm")
class GaussianMixturePrior(Prior):
    """Gaussian mixture fitted to the latents of the training images (as in DiffuseVAE's ex-post density estimation)."""

    weights: torch.Tensor
    means: torch.Tensor
    factors: torch.Tensor

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        components: int = 50
        """Gaussians in the mixture."""
        covariance: Covariance = Covariance.full
        """full, or diag for wide latents."""
        max_samples: int = 20_000
        """Latents to fit on, at most; the first of the data set."""
        regularisation: float = 1e-3
        """Added to the diagonal of each covariance."""

    def __init__(self, config: Config, io: Shapes) -> None:  # type: ignore[override]
        super().__init__(config, io)
        if config.components < 1:
            raise UserError(f"prior.components={config.components}: use 1 or more")
        self.config, self.shape = config, io.latent
        k, d = config.components, math.prod(io.latent)
        full = config.covariance is Covariance.full
        self.register_buffer("weights", torch.full((k,), 1.0 / k))
        self.register_buffer("means", torch.zeros(k, d))
        # L with covariance L L^T, or its diagonal
        self.register_buffer("factors", torch.eye(d).repeat(k, 1, 1) if full else torch.ones(k, d))

    def fit(self, mean: torch.Tensor, logvar: torch.Tensor, seed: int) -> dict[str, float]:
        """Fit to one draw z ~ q(z | x) per image, so that the mixture matches what the decoder was trained on.

        Returns "log_likelihood" per latent, in nats. Raises UserError where there are fewer latents than components.
        """
        n = min(len(mean), self.config.max_samples)
        if n < self.config.components:
            raise UserError(f"prior.components={self.config.components} is more than the {n} training images: use {n} or less")
        noise = np.random.default_rng(seed).standard_normal((n, self.means.shape[1]))
        z = mean[:n].flatten(1).double().numpy() + np.exp(0.5 * logvar[:n].flatten(1).double().numpy()) * noise
        kind = self.config.covariance
        mixture = GaussianMixture(
            self.config.components, covariance_type=kind.value, reg_covar=self.config.regularisation,
            random_state=seed, init_params="k-means++", max_iter=200,
        ).fit(z)  # fmt: skip
        covariance = torch.from_numpy(mixture.covariances_)
        factors = torch.linalg.cholesky(covariance) if kind is Covariance.full else covariance.sqrt()
        self.weights.copy_(torch.from_numpy(mixture.weights_))
        self.means.copy_(torch.from_numpy(mixture.means_))
        self.factors.copy_(factors)
        return {"log_likelihood": float(mixture.score(z))}

    def sample(self, uniform: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
        edges = torch.cumsum(self.weights.double(), 0)
        chosen = torch.searchsorted(edges / edges[-1], uniform.to(edges.device, torch.float64), right=True)
        chosen = chosen.clamp_max(len(edges) - 1)
        eps, factors = normal.flatten(1), self.factors[chosen]
        moved = torch.einsum("nij,nj->ni", factors, eps) if factors.ndim == 3 else factors * eps
        return (self.means[chosen] + moved).view(len(uniform), *self.shape)
