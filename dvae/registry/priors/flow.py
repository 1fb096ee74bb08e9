"""A normalizing flow that is fitted to the latents after training (real NVP: Dinh et al. 2017)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from dvae.errors import UserError
from dvae.registry.core import ComponentConfig, Shapes
from dvae.registry.priors.base import PRIORS, Prior, log_normal
from dvae.utils import rng

LARGEST_LOG_SCALE = 2.0
"""Bound on the absolute log-scale of one coupling.

tanh keeps the log-scale within this bound, so that no coupling moves a latent very far away.
"""
PURPOSE = "prior.flow"
"""Purpose (a key of dvae.utils.rng) of the random draws of this prior."""


class Coupling(nn.Module):
    """Affine coupling: scales and shifts some coordinates by functions of the other coordinates.

    It starts as the identity, because the last layer of its network starts at zero.
    """

    def __init__(self, known: int, changed: int, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(known, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2 * changed)
        )
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, known: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (log-scale, shift) of the changed coordinates, each (n, changed), from the known ones (n, known)."""
        raw, shift = self.net(known).chunk(2, 1)
        return LARGEST_LOG_SCALE * torch.tanh(raw / LARGEST_LOG_SCALE), shift


@PRIORS.register("flow")
class NormalizingFlow(Prior):
    """Normalizing flow of affine couplings on whitened latents.

    The prior is N(0, I) until it is fitted. Latents that are maps are flattened.

    The latents are whitened by their mean and full covariance, and the couplings start as the identity. So the flow
    equals a full-covariance Gaussian fit before the first training step. Each pair of couplings splits the coordinates
    into two new halves, and changes each half given the other. The seed of the fit decides the permutations.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        couplings: int = 8
        """Number of couplings; must be even. Each pair of couplings changes every coordinate once."""
        width: int = 128
        """Width of the two hidden layers in the network of each coupling."""
        steps: int = 3000
        """Number of Adam steps. The weights with the best validation log-likelihood are kept."""
        batch: int = 256
        """Batch size: latents per step."""
        lr: float = 1e-3
        """Learning rate at the first step. It decays to 0 along a cosine."""
        validation: float = 0.1
        """Fraction of the latents, between 0 and 1, that is held out to find the best step."""
        check_every: int = 100
        """Steps between two evaluations on the validation latents."""
        regularization: float = 1e-6
        """Constant that is added to the variances before whitening, in squared units of z; 0 or more."""
        fit_noise: bool = True
        """Fit samples z ~ q(z|x), drawn again at every step, instead of the posterior means."""

    center: torch.Tensor
    factor: torch.Tensor
    order: torch.Tensor

    def __init__(self, config: Config, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        d = math.prod(shapes.latent)
        _check(config, d)
        self.config = config
        self.register_buffer("center", torch.zeros(d))
        self.register_buffer("factor", torch.eye(d))
        self.register_buffer("order", torch.arange(d).repeat(config.couplings // 2, 1))
        self.couplings = _couplings(config, d)

    # -- the two directions --------------------------------------------------------------------------------------------

    def sample(self, uniform: torch.Tensor, normal: torch.Tensor) -> torch.Tensor:
        """Invert every coupling, the last one first, and undo the whitening. `uniform` is not used."""
        with torch.no_grad():
            e = normal.flatten(1).to(self.center)
            for known, changed, coupling in reversed(list(self._parts())):
                log_scale, shift = coupling(e[:, known])
                e = e.index_copy(1, changed, (e[:, changed] - shift) * torch.exp(-log_scale))
            return (self.center + e @ self.factor.T).view_as(normal).to(normal.dtype)

    def log_prob(self, z: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self._log_density(self._whitened(z.flatten(1).to(self.center)))

    def to_noise(self, z: torch.Tensor) -> torch.Tensor:
        """Return the noise `normal` (n, *latent) from which `sample` computes z (n, *latent)."""
        with torch.no_grad():
            return self._forward(self._whitened(z.flatten(1).to(self.center)))[0].view_as(z).to(z.dtype)

    def _parts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, nn.Module]]:
        """Yield (known coordinates, changed coordinates, coupling) of every coupling, in order from z to noise."""
        for i, coupling in enumerate(self.couplings):
            first, second = self.order[i // 2].tensor_split(2)
            yield (first, second, coupling) if i % 2 == 0 else (second, first, coupling)

    def _whitened(self, z: torch.Tensor) -> torch.Tensor:
        """Return whitened latents (n, D). The latents of the fit have mean 0 and covariance I after whitening."""
        return torch.linalg.solve_triangular(self.factor, (z - self.center).T, upper=False).T

    def _forward(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (noise (n, D), log |det d noise / dw| (n,)) of whitened latents w (n, D)."""
        volume = w.new_zeros(len(w))
        for known, changed, coupling in self._parts():
            log_scale, shift = coupling(w[:, known])
            w = w.index_copy(1, changed, w[:, changed] * torch.exp(log_scale) + shift)
            volume = volume + log_scale.sum(1)
        return w, volume

    def _log_density(self, w: torch.Tensor) -> torch.Tensor:
        """Return log p(z) (n,) in nats, float64, of whitened latents w (n, D)."""
        e, volume = self._forward(w)
        return log_normal(e) + volume.double() - self.factor.diagonal().double().log().sum()

    # -- the fit -------------------------------------------------------------------------------------------------------

    def fit(self, mean: torch.Tensor, logvar: torch.Tensor, seed: int) -> dict[str, float]:
        """Maximize the likelihood with Adam, and keep the weights that are best on the validation latents.

        The result is bit-identical for the same seed and number of threads. Raises UserError if there are fewer than
        2 D latents, because D coordinates could not be whitened.

        Returns:
            "samples": number of training latents.
            "log_likelihood_gaussian": validation log-likelihood before the first step, in nats (the full-covariance
            Gaussian fit).
            "log_likelihood": validation log-likelihood of the weights that are kept, in nats.
            "step": step of the weights that are kept.
        """
        config, n, d = self.config, len(mean), len(self.center)
        if n < 2 * d:
            raise UserError(
                f"prior flow: {n} latents are too few to whiten {d} coordinates: use {2 * d} or more images"
            )
        mean, logvar = mean.detach().float().flatten(1).cpu(), logvar.detach().float().flatten(1).cpu()
        std = torch.exp(0.5 * logvar) if config.fit_noise else torch.zeros_like(mean)
        self._initialize(_draw(mean, std, rng.generator(seed, PURPOSE)), seed)
        shuffled = torch.from_numpy(rng.generator(seed, f"{PURPOSE} split").permutation(n))
        held, training = shuffled.split([kept := max(1, round(config.validation * n)), n - kept])
        validation = _draw(mean[held], std[held], rng.generator(seed, f"{PURPOSE} validation"))
        before = best = self._mean_log_prob(validation)
        best_step, weights = 0, self._weights()
        for step in self._train(mean[training], std[training], seed):
            if (step % config.check_every == 0 or step == config.steps) and (
                now := self._mean_log_prob(validation)
            ) > best:
                best, best_step, weights = now, step, self._weights()
        self.couplings.load_state_dict(weights)
        return {
            "samples": float(len(training)),
            "log_likelihood_gaussian": before,
            "log_likelihood": best,
            "step": float(best_step),
        }

    def _train(self, mean: torch.Tensor, std: torch.Tensor, seed: int) -> Iterator[int]:
        """Train on samples of N(mean, std^2), both (n, D). Yields the number of steps taken, after each step."""
        config = self.config
        optimizer = torch.optim.Adam(self.parameters(), lr=config.lr)
        for step in range(config.steps):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * 0.5 * (1.0 + math.cos(math.pi * step / config.steps))
            draw = rng.generator(seed, f"{PURPOSE} batch", step)
            chosen = torch.from_numpy(draw.integers(len(mean), size=config.batch))
            z = _draw(mean[chosen], std[chosen], draw).to(self.center)
            with torch.enable_grad():
                loss = -self._log_density(self._whitened(z)).mean() / z.shape[1]
                optimizer.zero_grad()
                loss.backward()
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.step()
            yield step + 1

    def _initialize(self, latents: torch.Tensor, seed: int) -> None:
        """Set whitening, permutations and initial weights of the couplings, from latents (n, D)."""
        centered = latents.double() - latents.double().mean(0)
        covariance = centered.T @ centered / len(latents)
        covariance.diagonal().add_(self.config.regularization)
        self.center.copy_(latents.double().mean(0))
        self.factor.copy_(torch.linalg.cholesky(covariance))
        for i, row in enumerate(self.order):
            row.copy_(torch.from_numpy(rng.generator(seed, f"{PURPOSE} order", i).permutation(len(row))))
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(rng.child(seed, PURPOSE))
            self.couplings.load_state_dict(_couplings(self.config, len(self.center)).state_dict())

    def _mean_log_prob(self, z: torch.Tensor) -> float:
        """Return the mean of log p(z) over z (n, D), in nats."""
        return float(self.log_prob(z.to(self.center.device)).mean())

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.couplings.state_dict().items()}


def _couplings(config: NormalizingFlow.Config, d: int) -> nn.ModuleList:
    """Build new couplings for d coordinates. They alternate between changing the second and the first half."""
    more, less = d - d // 2, d // 2  # torch.tensor_split makes the first part the larger one
    sizes = [(more, less), (less, more)]
    return nn.ModuleList(Coupling(*sizes[i % 2], config.width) for i in range(config.couplings))


def _draw(mean: torch.Tensor, std: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Return samples (n, D) of N(mean, std^2), float32. mean and std have shape (n, D)."""
    return mean + std * torch.from_numpy(generator.standard_normal(mean.shape, dtype=np.float32))


def _check(config: NormalizingFlow.Config, d: int) -> None:
    """Raise UserError if a field is out of range."""
    if d < 2:
        raise UserError(f"prior=flow needs a latent of 2 or more numbers, this latent has {d}: use prior=gmm or normal")
    if config.couplings < 2 or config.couplings % 2:
        raise UserError(f"prior.couplings={config.couplings}: use an even number, 2 or more")
    for name in ("width", "steps", "batch", "check_every"):
        if getattr(config, name) < 1:
            raise UserError(f"prior.{name}={getattr(config, name)}: use 1 or more")
    if not config.lr > 0.0:
        raise UserError(f"prior.lr={config.lr}: must be above 0; 1e-3 is usual")
    if not 0.0 < config.validation < 1.0:
        raise UserError(f"prior.validation={config.validation}: must be above 0 and below 1; 0.1 is usual")
    if config.regularization < 0.0:
        raise UserError(f"prior.regularization={config.regularization}: use 0 or more")
