"""A normalizing flow fitted to the latents after training (real NVP: Dinh et al. 2017)."""

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
"""Of one coupling: tanh keeps the logarithm of every scale within this, so that no latent is thrown far away."""
PURPOSE = "prior.flow"
"""Purpose of the keyed draws."""


class Coupling(nn.Module):
    """Scales and shifts some coordinates by functions of the others; the identity until it is trained."""

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
        """(log of the scale, shift) of the changed coordinates, each (n, changed), from the known ones (n, known)."""
        raw, shift = self.net(known).chunk(2, 1)
        return LARGEST_LOG_SCALE * torch.tanh(raw / LARGEST_LOG_SCALE), shift


@PRIORS.register("flow")
class NormalizingFlow(Prior):
    """Affine couplings on whitened latents. N(0, I) until it is fitted. Maps are flattened.

    Whitened by the mean and the full covariance of the latents, the couplings start as the identity, so that before its
    first step the flow is the full-covariance Gaussian fit. Each pair of couplings divides the coordinates anew, by a
    permutation that the seed of the fit decides, and changes either half given the other.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ComponentConfig):
        couplings: int = 8
        """Couplings, an even number; every two of them change each coordinate once."""
        width: int = 128
        """Width of the two hidden layers of each coupling's network."""
        steps: int = 3000
        """Steps of Adam, at most; those after the best figure on the validation latents are taken back."""
        batch: int = 256
        """Latents per step."""
        lr: float = 1e-3
        """Learning rate at the first step, from which it falls to 0 as a cosine."""
        validation: float = 0.1
        """Share of the latents that is kept from training, to find the best step."""
        check_every: int = 100
        """Steps between looks at the validation latents."""
        regularization: float = 1e-6
        """Added to the variances before whitening, in squared units of z."""
        fit_noise: bool = True
        """Whether to fit draws z ~ q(z|x), drawn anew at every step, instead of the posteriors' means."""

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
        """Every coupling undone, the last one first; `uniform` plays no part."""
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
        """The `normal` from which `sample` makes z, both (n, *latent)."""
        with torch.no_grad():
            return self._forward(self._whitened(z.flatten(1).to(self.center)))[0].view_as(z).to(z.dtype)

    def _parts(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, nn.Module]]:
        """(known coordinates, changed coordinates, coupling), from z to noise."""
        for i, coupling in enumerate(self.couplings):
            first, second = self.order[i // 2].tensor_split(2)
            yield (first, second, coupling) if i % 2 == 0 else (second, first, coupling)

    def _whitened(self, z: torch.Tensor) -> torch.Tensor:
        """Latents (n, D) with mean 0 and covariance I over the fit's."""
        return torch.linalg.solve_triangular(self.factor, (z - self.center).T, upper=False).T

    def _forward(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(noise (n, D), log of the determinant of d noise / dw (n,)) from whitened latents w (n, D)."""
        volume = w.new_zeros(len(w))
        for known, changed, coupling in self._parts():
            log_scale, shift = coupling(w[:, known])
            w = w.index_copy(1, changed, w[:, changed] * torch.exp(log_scale) + shift)
            volume = volume + log_scale.sum(1)
        return w, volume

    def _log_density(self, w: torch.Tensor) -> torch.Tensor:
        """log p(z) in nats, (n,), float64, from whitened latents."""
        e, volume = self._forward(w)
        return log_normal(e) + volume.double() - self.factor.diagonal().double().log().sum()

    # -- the fit -------------------------------------------------------------------------------------------------------

    def fit(self, mean: torch.Tensor, logvar: torch.Tensor, seed: int) -> dict[str, float]:
        """Maximize the likelihood by Adam; keep the step that is best on the validation latents.

        Returns the latents trained on, the validation log-likelihood in nats before (the full-covariance Gaussian) and
        after, and the step that is kept. Same bits for the same seed and number of threads. Raises UserError where
        there are fewer latents than twice their length.
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
        """Take the steps, on latents of N(mean, std^2), both (n, D); yields the number of each that was taken."""
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
        """Whiten by latents (n, D), divide the coordinates, and draw the first weights."""
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
        """Over z (n, D), in nats."""
        return float(self.log_prob(z.to(self.center.device)).mean())

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().clone() for name, value in self.couplings.state_dict().items()}


def _couplings(config: NormalizingFlow.Config, d: int) -> nn.ModuleList:
    """New ones for d coordinates, every other one from the first half to the second."""
    more, less = d - d // 2, d // 2  # as torch.tensor_split divides
    sizes = [(more, less), (less, more)]
    return nn.ModuleList(Coupling(*sizes[i % 2], config.width) for i in range(config.couplings))


def _draw(mean: torch.Tensor, std: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
    """Latents of N(mean, std^2), both (n, D), float32."""
    return mean + std * torch.from_numpy(generator.standard_normal(mean.shape, dtype=np.float32))


def _check(config: NormalizingFlow.Config, d: int) -> None:
    """Raise UserError for a field that cannot be."""
    if d < 2:
        raise UserError(f"prior=flow changes numbers given others, the latent has {d}: use prior=gmm or normal")
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
