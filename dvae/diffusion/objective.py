"""The training objective over time: the weight of the error at each time, and the distribution of times.

Let r = sigma/alpha and SNR = 1/r^2. The weights are given as factors on the squared error of x0. A known factor
converts them to another prediction type:

    |x0 error|^2 = |eps error|^2 / SNR = |v error|^2 / (1 + SNR)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch

from dvae.diffusion.kernels import Diffusion
from dvae.errors import UserError


class PredictionType(Enum):
    """The quantity that the refiner predicts: noise, clean state or velocity (Salimans & Ho 2022, appendix D).

    The velocity of flow matching is eps - x0 = (v + (2t - 1) u) / sqrt(t^2 + (1 - t)^2) on schedule=flow. EDM's network
    output is -v (Karras et al. 2022, table 1). Both are equivalent to v with another weight.
    """

    eps = "eps"
    x0 = "x0"
    v = "v"


class Weighting(Enum):
    """Weight of the error as a function of time.

    Unless stated otherwise, the weight is a factor on the squared error of x0, for data of unit variance.
    """

    simple = "simple"
    """1 on the squared error of the predicted quantity itself (Ho et al. 2020, equation 14)."""
    truncated_snr = "truncated_snr"
    """max(SNR, 1) (Salimans & Ho 2022, section 4)."""
    min_snr = "min_snr"
    """min(SNR, snr_limit) (Hang et al. 2023, section 3.4)."""
    edm = "edm"
    """1 + SNR, which is 1 on v (Karras et al. 2022, table 1)."""
    flow = "flow"
    """(1 + 1/r)^2, which is 1 on the velocity eps - x0 of flow matching (Lipman et al. 2023, equation 23)."""
    likelihood = "likelihood"
    """Half the squared diffusion coefficient on the squared error of the score. The loss is then a bound on -log p(x)
    (Song et al. 2021b, equation 7)."""


class TimeSampling(Enum):
    """Distribution of the times that training draws."""

    uniform = "uniform"
    """Uniform in [t_min, 1]."""
    importance = "importance"
    """Density proportional to the weight, and the loss divided by the density. The expected loss is the same, with less
    variance (Song et al. 2021b)."""
    log_normal = "log_normal"
    """ln(sigma/alpha) ~ N(log_mean, log_std^2) (Karras et al. 2022). On schedule=flow this is the logit-normal t of
    SD3."""


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """The training objective: weights and times."""

    weighting: Weighting = Weighting.simple
    """Weight of the error over time: simple | truncated_snr | min_snr | edm | flow | likelihood. For k > 1 only simple
    and likelihood are defined."""
    snr_limit: float = 5.0
    """gamma of min_snr: the upper limit of the SNR, above 0."""
    times: TimeSampling = TimeSampling.uniform
    """Distribution of the training times: uniform | importance | log_normal. log_normal needs k = 1."""
    log_mean: float = -1.2
    """Mean of ln(sigma/alpha) for times=log_normal, for the scaled data. EDM's -1.2 at sigma_data = 0.5 corresponds to
    -0.51 at unit variance."""
    log_std: float = 1.2
    """Standard deviation of ln(sigma/alpha) for times=log_normal, above 0."""
    t_min: float = 1e-5
    """Smallest training time on a continuous schedule, in (0, 1)."""


class Objective:
    """Weights and times of one training.

    Raises UserError if a setting is out of range, or if the weights or times are not defined for the diffusion.
    """

    def __init__(self, config: LossConfig, diffusion: Diffusion, prediction: PredictionType) -> None:
        _check(config, diffusion)
        self.config, self.diffusion, self.prediction = config, diffusion, prediction
        self._density = self._importance() if config.times is TimeSampling.importance else None

    def sample_times(self, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (t, W) for uniform draws (B,) in [0, 1).

        t (B,) is in (0, 1]. W (B, p, p) is the weight for the p predicted components, divided by the relative density
        of t. The loss is error^T W error. Unless times=log_normal, its expectation is the weighted error, averaged
        uniformly over t.
        """
        t, density = self._sample(uniform)
        return t, self.weight(t) / density[:, None, None]

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """Return the weight W (B, p, p), float64, of the squared error of the predicted quantity at times t (B,)."""
        components = len(self.diffusion.predicted_components)
        eye = torch.eye(components, dtype=torch.float64, device="cpu").expand(len(t), -1, -1)
        if self.config.weighting is Weighting.simple:
            return eye
        if self.config.weighting is Weighting.likelihood:
            return self._likelihood(t)
        return self._scalar(t)[:, None, None] * eye

    def _scalar(self, t: torch.Tensor) -> torch.Tensor:
        """Return the weights that are functions of the SNR, (B,), on the predicted quantity."""
        B = self.diffusion.schedule.integral(t)
        snr = 1.0 / torch.expm1(B)
        match self.config.weighting:
            case Weighting.truncated_snr:
                on_x0 = snr.clamp(min=1.0)
            case Weighting.min_snr:
                on_x0 = snr.clamp(max=self.config.snr_limit)
            case Weighting.edm:
                on_x0 = 1.0 + snr
            case _:  # flow
                on_x0 = (1.0 + snr.sqrt()) ** 2
        return on_x0 * self._x0_error(snr)

    def _x0_error(self, snr: torch.Tensor) -> torch.Tensor:
        """Return the ratio of |x0 error|^2 to the squared error of the predicted quantity."""
        match self.prediction:
            case PredictionType.x0:
                return torch.ones_like(snr)
            case PredictionType.eps:
                return 1.0 / snr
            case PredictionType.v:
                return 1.0 / (1.0 + snr)

    def _likelihood(self, t: torch.Tensor) -> torch.Tensor:
        """Return the likelihood weight (B, p, p). On eps it is beta L^-1 D L^-T.

        The error of the score is -L^-T times the error of eps, and the diffusion coefficient is sqrt(2 D beta).
        """
        inverse = torch.linalg.inv(self.diffusion.marginal(t)[1])
        W = inverse @ self.diffusion.D @ inverse.mT * self.diffusion.schedule.rate(t)[:, None, None]
        chosen = list(self.diffusion.predicted_components)
        W = W[:, chosen][:, :, chosen]
        if self.prediction is PredictionType.eps:
            return W
        snr = 1.0 / torch.expm1(self.diffusion.schedule.integral(t))
        return W * (snr * self._x0_error(snr))[:, None, None]

    def _sample(self, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (t, density), each (B,). The density is relative to uniform times.

        It is 1 for log_normal too, because there the distribution of times is part of the objective.
        """
        config, steps = self.config, self.diffusion.schedule.steps
        if self._density is not None:
            return self._density.sample(uniform)
        if config.times is TimeSampling.log_normal:
            normal = torch.special.ndtri(uniform.clamp(2**-54, 1 - 2**-53))  # ndtri is infinite at 0 and 1
            r = torch.exp(config.log_mean + config.log_std * normal)
            t = self.diffusion.schedule.inverse(torch.log1p(r**2)).clamp(config.t_min, 1.0)
        else:
            t = 1.0 - uniform * (1.0 if steps else 1.0 - config.t_min)
        return torch.ceil(t * steps) / steps if steps else t, torch.ones_like(t)

    def _importance(self) -> PiecewiseDensity:
        """Return the density proportional to the weight.

        Its edges are the schedule's discrete times, or else a grid that is fine near t = 0 and near t = 1.
        """
        steps = self.diffusion.schedule.steps
        if steps:
            edges = torch.arange(steps + 1, dtype=torch.float64, device="cpu") / steps
            return PiecewiseDensity(edges, self._mean_weight(edges[1:]), discrete=True)
        low = torch.logspace(math.log10(self.config.t_min), 0.0, 4097, dtype=torch.float64, device="cpu")
        edges = torch.cat([low, (1.0 - low)[1.0 - low > low[0]]]).unique()
        return PiecewiseDensity(edges, self._mean_weight((edges[:-1] * edges[1:]).sqrt()), discrete=False)

    def _mean_weight(self, t: torch.Tensor) -> torch.Tensor:
        return self.weight(t).diagonal(dim1=1, dim2=2).mean(1)


@dataclass(frozen=True)
class PiecewiseDensity:
    """A density that is constant in each cell between two `edges`, and proportional to `weight` there."""

    edges: torch.Tensor
    """Edges of the cells, (n + 1,), increasing."""
    weight: torch.Tensor
    """Weight of each cell, (n,)."""
    discrete: bool
    """Whether to draw only the upper edge of a cell, instead of a point inside it."""

    def sample(self, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (t, density of t relative to the uniform one), each (B,), for uniform draws (B,) in [0, 1)."""
        widths = self.edges.diff()
        mass = self.weight * widths
        cumulative = torch.cat([torch.zeros_like(mass[:1]), mass.cumsum(0) / mass.sum()])
        cell = (torch.searchsorted(cumulative, uniform, right=True) - 1).clamp(0, len(mass) - 1)
        inside = (uniform - cumulative[cell]) / (cumulative[cell + 1] - cumulative[cell])
        t = self.edges[cell + 1] if self.discrete else self.edges[cell] + inside * widths[cell]
        return t, self.weight[cell] / mass.sum() * widths.sum()


def _check(config: LossConfig, diffusion: Diffusion) -> None:
    weighting, times = config.weighting, config.times
    if diffusion.k > 1 and weighting not in (Weighting.simple, Weighting.likelihood):
        raise UserError(
            f"denoiser.loss.weighting={weighting.name} needs a process with k = 1, because it is a function of the "
            f"signal-to-noise ratio; this process has k = {diffusion.k}: use simple or likelihood"
        )
    if diffusion.k > 1 and times is TimeSampling.log_normal:
        raise UserError(
            "denoiser.loss.times=log_normal needs a process with k = 1, because it draws the signal-to-noise ratio; "
            f"this process has k = {diffusion.k}: use uniform or importance"
        )
    if diffusion.schedule.zero_terminal_snr and (weighting is Weighting.likelihood or times is TimeSampling.importance):
        raise UserError(
            f"denoiser.loss: weighting={weighting.name} with times={times.name} needs a schedule whose B is not "
            "infinite at t = 1: use another weighting, times=uniform, or another schedule"
        )
    if not 0.0 < config.t_min < 1.0:
        raise UserError(f"denoiser.loss.t_min={config.t_min}: must be above 0 and below 1; the papers use 1e-5")
    for name in ("snr_limit", "log_std"):
        if not getattr(config, name) > 0.0:
            raise UserError(f"denoiser.loss.{name}={getattr(config, name)}: must be above 0")
