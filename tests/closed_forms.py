"""The exact denoiser of a mixture of Gaussians, for any process: the known answer that samplers are tested with."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from dvae.diffusion.kernels import Diffusion, Matching, Prediction, Time
from dvae.diffusion.linalg import apply_matrix
from dvae.diffusion.sampler_model import SamplerModel, Threshold
from dvae.registry.core import Shapes
from dvae.registry.processes.base import PROCESSES
from dvae.registry.samplers.base import SAMPLERS, Sampler
from dvae.registry.schedules.base import SCHEDULES

IO = Shapes(image_size=1, channels=1)


@dataclass
class Mixture:
    """E[eps | u_t] where each pixel of x0 is drawn from sum_i weights_i N(means_i, variances_i), apart from others.

    A Model (dvae.diffusion.sampler_model): counts its calls and keeps the times it was asked for.
    """

    diffusion: Diffusion
    means: tuple[float, ...] = (0.3,)
    variances: tuple[float, ...] = (0.25,)
    weights: tuple[float, ...] = (1.0,)
    nfe_per_call: int = 1

    def __post_init__(self) -> None:
        self.calls: list[Time] = []

    @property
    def mean(self) -> float:
        return sum(w * m for w, m in zip(self.weights, self.means, strict=True))

    @property
    def variance(self) -> float:
        second = sum(w * (v + m**2) for w, m, v in zip(self.weights, self.means, self.variances, strict=True))
        return second - self.mean**2

    def covariance(self, t: Time, variance: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(Phi, covariance of u_t), each (B, k, k), where x0 has `variance`."""
        Phi, L = self.diffusion.marginal(t)
        drawn = torch.zeros(self.diffusion.k, self.diffusion.k, dtype=torch.float64)
        if self.diffusion.matching is Matching.dsm:  # else L holds the spread of the other components at t = 0
            drawn = torch.from_numpy(self.diffusion.process.S_0)
        drawn[0, 0] = variance
        return Phi, Phi @ drawn @ Phi.mT + L @ L.mT

    def given_each(self, u: torch.Tensor, t: Time) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """For each Gaussian i: log of its weight times its p_t(u), E[x0 | u, i], both (n, B, C, H, W); its score."""
        k, logs, x0s, scores = self.diffusion.k, [], [], []
        for weight, mean, variance in zip(self.weights, self.means, self.variances, strict=True):
            Phi, S = self.covariance(t, variance)
            away = u - apply_matrix(Phi, self.diffusion.initial_state(torch.full_like(u[:, : u.shape[1] // k], mean)))
            weighed = apply_matrix(torch.linalg.inv(S), away)
            square = (away * weighed).unflatten(1, (k, -1)).sum(1)
            constant = math.log(weight) - 0.5 * k * math.log(2 * math.pi) - 0.5 * torch.linalg.slogdet(S)[1]
            logs.append(constant.to(u.dtype)[:, None, None, None] - 0.5 * square)
            x0s.append(mean + variance * apply_matrix(Phi[:, :, :1].mT, weighed))
            scores.append(-weighed)
        return torch.stack(logs), torch.stack(x0s), torch.stack(scores)

    def log_density(self, u: torch.Tensor, t: Time) -> torch.Tensor:
        """log p_t of each pixel's k components, (B, C, H, W)."""
        return torch.logsumexp(self.given_each(u, t)[0], 0)

    def x0_and_score(self, u: torch.Tensor, t: Time) -> tuple[torch.Tensor, torch.Tensor]:
        """E[x0 | u], (B, C, H, W), also where nothing is left of the data, and grad_u log p_t, (B, k*C, H, W)."""
        logs, x0s, scores = self.given_each(u, t)
        share = torch.exp(logs - torch.logsumexp(logs, 0))  # torch.softmax rounds differently in another batch
        return (share * x0s).sum(0), (share.repeat(1, 1, self.diffusion.k, 1, 1) * scores).sum(0)

    def x0(self, u: torch.Tensor, t: Time) -> torch.Tensor:
        return self.x0_and_score(u, t)[0]

    def score(self, u: torch.Tensor, t: Time) -> torch.Tensor:
        return self.x0_and_score(u, t)[1]

    def __getitem__(self, rows: torch.Tensor) -> Mixture:
        return self

    def __call__(self, u: torch.Tensor, t: Time, *, threshold: Threshold = Threshold.none) -> Prediction:
        self.calls.append(t)
        x0, score = self.x0_and_score(u, t)
        eps = self.diffusion.eps_from_score(score, t)
        if threshold is Threshold.clamp:
            cut = x0.clamp(-1.0, 1.0)
            eps, x0 = self.diffusion.shift_eps(cut - x0, t, eps), cut
            score = self.diffusion.score_from_eps(eps, t)
        return Prediction(eps, x0, score)


def diffusion(process: str = "vp", schedule: str = "linear", *, fields: dict | None = None, **more) -> Diffusion:
    """A diffusion of registered names; `fields` are the schedule's, `more` goes to Diffusion."""
    return Diffusion(
        PROCESSES.build({"name": process}, IO), SCHEDULES.build({"name": schedule, **(fields or {})}, IO), **more
    )


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integrable(processes: tuple[str, ...], schedules: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """(sampler, process, schedule), by name, of each registered sampler that integrates a denoiser of the two."""
    found = []
    for process in processes:
        for schedule in schedules:
            made = diffusion(process, schedule)
            shapes = replace(IO, k=made.k)
            found += [
                (name, process, schedule)
                for name in SAMPLERS.names()
                if SAMPLERS.get(name).needs_mean_denoiser and SAMPLERS.build({"name": name}, shapes).supports(made)
            ]
    return found


def affine(sampler: Sampler, model: SamplerModel, noises: int, at: int = -1) -> tuple[float, float]:
    """Mean and variance of x where the sampler is an affine map of the start and of its first `noises` noises: exact.

    From its response to none and to each component of each. at: of which state, -1 the images, -2 the last at t > 0.
    """
    k, states = model.diffusion.k, []
    units = torch.cat([torch.zeros(1, k * (1 + noises)), torch.eye(k * (1 + noises))]).double()[..., None, None]

    def keep(i: int, t: float, u: torch.Tensor) -> torch.Tensor:
        states.append(u[:, 0].flatten())
        return u

    start = model.diffusion.sample_prior(units[:, :k])
    sampler.sample(model, start, lambda i: units[:, k * (i + 1) : k * (i + 2)], keep)
    x = states[at]
    return x[0].item(), (x[1:] - x[0]).square().sum().item()
