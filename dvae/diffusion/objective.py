"""The training objective over time: how errors are weighted, and which times are drawn.

With r = sigma/alpha and SNR = 1/r^2, the weights of the literature are factors on the squared error of x0. The same
error in another prediction type is larger or smaller by a known factor, |x0 error|^2 = |eps error|^2 / SNR =
|v error|^2 / (1 + SNR), so one table serves all three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch

from dvae.diffusion.kernels import Diffusion
from dvae.errors import UserError


class PredictionType(Enum):
    """What the refiner's output means (Salimans & Ho 2022, appendix D): noise, clean state, or velocity.

    The velocity of flow matching, eps - x0, is (v + (2t - 1) u) / sqrt(t^2 + (1 - t)^2) on schedule=flow, and EDM's
    network output is -v (Karras et al. 2022, table 1): both are v, with another weight.
    """

    eps = "eps"
    x0 = "x0"
    v = "v"


class Weighting(Enum):
    """Weight of a time; the factors are on the squared error of x0 for data of unit variance."""

    simple = "simple"
    """1 on the predicted quantity itself (Ho et al. 2020, equation 14)."""
    truncated_snr = "truncated_snr"
    """max(SNR, 1) (Salimans & Ho 2022, section 4)."""
    min_snr = "min_snr"
    """min(SNR, snr_limit) (Hang et al. 2023, section 3.4)."""
    edm = "edm"
    """1 + SNR (Karras et al. 2022, table 1): 1 on v."""
    flow = "flow"
    """(1 + 1/r)^2: 1 on the velocity eps - x0 of flow matching (Lipman et al. 2023, equation 23)."""
    likelihood = "likelihood"
    """Half the squared diffusion coefficient on the score: a bound on -log p(x) (Song et al. 2021b, equation 7)."""


class TimeSampling(Enum):
    """Which times training draws."""

    uniform = "uniform"
    """Evenly in [t_min, 1]."""
    importance = "importance"
    """In proportion to the weight, which is divided out: the same loss with less variance (Song et al. 2021b)."""
    log_normal = "log_normal"
    """ln(sigma/alpha) ~ N(log_mean, log_std^2) (Karras et al. 2022); on schedule=flow this is SD3's logit-normal t."""


@dataclass(kw_only=True, slots=True)
class LossConfig:
    """The objective over time."""

    weighting: Weighting = Weighting.simple
    """simple | truncated_snr | min_snr | edm | flow | likelihood; simple and likelihood for k > 1."""
    snr_limit: float = 5.0
    """gamma of min_snr."""
    times: TimeSampling = TimeSampling.uniform
    """uniform | importance | log_normal (k = 1)."""
    log_mean: float = -1.2
    """Mean of ln(sigma/alpha), of the scaled data: EDM's -1.2 at sigma_data = 0.5 is -0.51 at unit variance."""
    log_std: float = 1.2
    """Standard deviation of ln(sigma/alpha)."""
    t_min: float = 1e-5
    """Smallest time that is drawn, where the schedule is continuous."""


class Objective:
    """Weights and times of one training. Raises UserError where they are not defined for the diffusion."""

    def __init__(self, config: LossConfig, diffusion: Diffusion, prediction: PredictionType) -> None:
        _check(config, diffusion)
        self.config, self.diffusion, self.prediction = config, diffusion, prediction
        self._density = self._importance() if config.times is TimeSampling.importance else None

    def sample_times(self, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(t, weight), from uniform draws in [0, 1): t (B,) in (0, 1], and W (B, p, p) for the p predicted components.

        The loss is error^T W error; it is unbiased for the uniform mean of the weighted error unless times=log_normal.
        """
        t, density = self._sample(uniform)
        return t, self.weight(t) / density[:, None, None]

    def weight(self, t: torch.Tensor) -> torch.Tensor:
        """W (B, p, p), float64, of the squared error of the predicted quantity at times t (B,)."""
        components = len(self.diffusion.predicted_components)
        eye = torch.eye(components, dtype=torch.float64, device="cpu").expand(len(t), -1, -1)
        if self.config.weighting is Weighting.simple:
            return eye
        if self.config.weighting is Weighting.likelihood:
            return self._likelihood(t)
        return self._scalar(t)[:, None, None] * eye

    def _scalar(self, t: torch.Tensor) -> torch.Tensor:
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
        """|x0 error|^2 per |error of the predicted quantity|^2."""
        match self.prediction:
            case PredictionType.x0:
                return torch.ones_like(snr)
            case PredictionType.eps:
                return 1.0 / snr
            case PredictionType.v:
                return 1.0 / (1.0 + snr)

    def _likelihood(self, t: torch.Tensor) -> torch.Tensor:
        """beta L^-1 D L^-T on eps: the score's error is -L^-T times that of eps, and the noise is sqrt(2 D beta)."""
        inverse = torch.linalg.inv(self.diffusion.marginal(t)[1])
        W = inverse @ self.diffusion.D @ inverse.mT * self.diffusion.schedule.rate(t)[:, None, None]
        chosen = list(self.diffusion.predicted_components)
        W = W[:, chosen][:, :, chosen]
        if self.prediction is PredictionType.eps:
            return W
        snr = 1.0 / torch.expm1(self.diffusion.schedule.integral(t))
        return W * (snr * self._x0_error(snr))[:, None, None]

    def _sample(self, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(t, density of t relative to the uniform one; 1 where the draw itself is the objective), each (B,)."""
        config, steps = self.config, self.diffusion.schedule.steps
        if self._density is not None:
            return self._density.sample(uniform)
        if config.times is TimeSampling.log_normal:
            normal = torch.special.ndtri(uniform.clamp(2**-54, 1 - 2**-53))
            r = torch.exp(config.log_mean + config.log_std * normal)
            t = self.diffusion.schedule.inverse(torch.log1p(r**2)).clamp(config.t_min, 1.0)
        else:
            t = 1.0 - uniform * (1.0 if steps else 1.0 - config.t_min)
        return torch.ceil(t * steps) / steps if steps else t, torch.ones_like(t)

    def _importance(self) -> PiecewiseDensity:
        """Where the weight is: on the schedule's own times, or on a grid that is fine near t = 0 and near t = 1."""
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
    """A density that is constant between `edges` (n + 1,), in proportion to `weight` (n,)."""

    edges: torch.Tensor
    weight: torch.Tensor
    discrete: bool
    """Only the upper edges are drawn."""

    def sample(self, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
            f"denoiser.loss.weighting={weighting.name} is a function of one signal-to-noise ratio, a process with k = "
            f"{diffusion.k} has none: use simple or likelihood"
        )
    if diffusion.k > 1 and times is TimeSampling.log_normal:
        raise UserError(
            "denoiser.loss.times=log_normal is a draw of one signal-to-noise ratio, a process with k = "
            f"{diffusion.k} has none: use uniform or importance"
        )
    if diffusion.schedule.zero_terminal_snr and (weighting is Weighting.likelihood or times is TimeSampling.importance):
        raise UserError(
            f"denoiser.loss: weighting={weighting.name} with times={times.name} has no finite mean on a schedule whose "
            "B is infinite at t = 1: use another weighting, times=uniform, or another schedule"
        )
    if not 0.0 < config.t_min < 1.0:
        raise UserError(f"denoiser.loss.t_min={config.t_min}: must be above 0 and below 1; the papers have 1e-5")
    for name in ("snr_limit", "log_std"):
        if not getattr(config, name) > 0.0:
            raise UserError(f"denoiser.loss.{name}={getattr(config, name)}: must be above 0")
