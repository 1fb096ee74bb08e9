"""The denoiser: refiner + diffusion + condition in one place, with the loss, so that scalings cannot drift apart.

Coordinates. The diffusion runs in a state y whose clean end is y_0 = data_scale * (x - shift):

    centre     shift    the refiner sees     known as
    none       0        u                    DiffuseVAE formulation 1
    input      0        u + x_hat            DiffuseVAE formulation 2 (in the coordinate y = x_t - x_hat)
    residual   x_hat    u                    the refiner draws only what the VAE left out

Where a sample's condition is dropped (classifier-free training), x_hat is zero for it, and so is every shift.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import nn

from dvae import keyed
from dvae.diffusion import Diffusion, Prediction
from dvae.errors import UserError
from dvae.registry.core import Shapes
from dvae.registry.refiners import Condition, Refiner


class PredictionType(Enum):
    """What the refiner's output means (Salimans & Ho 2022, appendix D): noise, clean state, or velocity."""

    eps = "eps"
    x0 = "x0"
    v = "v"


class Centre(Enum):
    """Where x_hat enters besides concatenation; see the table above."""

    none = "none"
    input = "input"
    residual = "residual"


@dataclass(kw_only=True, slots=True)
class DenoiserConfig:
    """Settings of the denoiser."""

    prediction: PredictionType = PredictionType.eps
    """eps (DDPM, DiffuseVAE), x0 or v."""
    centre: Centre = Centre.none
    """none: formulation 1; input: formulation 2; residual: diffuse what x_hat lacks."""
    data_scale: float | None = 1.0
    """Factor on the clean state; null: 1 / standard deviation, measured on training images when the stage starts."""
    condition_image: bool = True
    """Concatenate x_hat to the refiner's input."""
    condition_latent: bool = False
    """Latent guidance: the refiner is also given z."""
    condition_dropout: float = 0.0
    """Probability, per sample, of dropping x_hat and z together in training; above 0 it allows guidance != 0."""


@dataclass(frozen=True)
class Given:
    """What a batch of images is refined from: x_hat (B, C, H, W) in [-1, 1] and its z (B, *latent)."""

    x_hat: torch.Tensor
    z: torch.Tensor

    def drop(self, keep: torch.Tensor) -> Given:
        """Zeros where keep (B,) is false."""
        return Given(self.x_hat * _column(keep, self.x_hat), self.z * _column(keep, self.z))


@dataclass(frozen=True)
class Draws:
    """The random numbers of one training batch, each keyed by its global sample number."""

    t: torch.Tensor
    """(B,) float64 in (0, 1]."""
    eps: torch.Tensor
    """(B, k*C, H, W), standard normal."""
    keep: torch.Tensor
    """(B,) bool: the condition is kept."""


def _column(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 1, 1, 1) of like's dtype and device, to scale the samples of a batch."""
    return values.to(like.device, like.dtype).view(-1, *[1] * (like.ndim - 1))


class Denoiser(nn.Module):
    """Loss and prediction of a conditional refiner. Everything but the network itself runs in fp32."""

    data_scale: torch.Tensor

    def __init__(self, refiner: Refiner, diffusion: Diffusion, config: DenoiserConfig, io: Shapes) -> None:
        super().__init__()
        if config.centre is not Centre.none and not config.condition_image:
            raise UserError(f"denoiser.centre={config.centre.name} needs x_hat: set denoiser.condition_image=true")
        if not 0.0 <= config.condition_dropout <= 1.0:
            raise UserError(f"denoiser.condition_dropout={config.condition_dropout} is not a probability: use 0 to 1")
        if config.data_scale is not None and config.data_scale <= 0:
            raise UserError(f"denoiser.data_scale={config.data_scale} must be above 0, or null to measure it")
        if diffusion.k != 1 and config.prediction is not PredictionType.eps:
            raise UserError(f"denoiser.prediction={config.prediction.name} is defined for k = 1 only: use eps")
        self.refiner = refiner
        self.diffusion = diffusion
        self.config = config
        self.io = io
        # a buffer, so that a measured scale travels with the weights
        self.register_buffer("data_scale", torch.tensor(config.data_scale or 1.0, dtype=torch.float32))

    def shift(self, given: Given) -> torch.Tensor:
        """Centre of the state, (B, C, H, W)."""
        return given.x_hat if self.config.centre is Centre.residual else torch.zeros_like(given.x_hat)

    def to_state(self, x: torch.Tensor, given: Given) -> torch.Tensor:
        """Clean state y_0 of images x (B, C, H, W)."""
        return self.data_scale * (x - self.shift(given))

    def to_image(self, state: torch.Tensor, given: Given) -> torch.Tensor:
        """Images of clean states (B, C, H, W)."""
        return state / self.data_scale + self.shift(given)

    def draw(self, seed: int, keys: torch.Tensor) -> Draws:
        """t, eps and the dropping of conditions for the sample numbers keys (B,)."""
        numbers = keys.tolist()
        t = 1.0 - keyed.uniform(seed, "time", numbers)  # in (0, 1]
        steps = self.diffusion.schedule.steps
        if steps:
            t = torch.ceil(t * steps) / steps
        shape = (self.io.k * self.io.channels, self.io.image_size, self.io.image_size)
        keep = keyed.uniform(seed, "drop", numbers) >= self.config.condition_dropout
        return Draws(t, keyed.normal(seed, "noise", numbers, shape), keep)

    def output(self, u: torch.Tensor, t: torch.Tensor, given: Given) -> torch.Tensor:
        """The refiner's raw output (B, k*C, H, W), fp32, for states u at times t (B,)."""
        seen = u + given.x_hat if self.config.centre is Centre.input else u
        condition = Condition(
            image=given.x_hat if self.config.condition_image else None,
            latent=given.z if self.config.condition_latent else None,
        )
        feature = self.diffusion.schedule.feature(t).to(u.device, torch.float32)
        return self.refiner(seen, feature, condition).float()

    def forward(self, x: torch.Tensor, given: Given, draws: Draws) -> torch.Tensor:
        """Per-sample loss (B,): mean squared error of the predicted quantity (Ho et al. 2020, eq. 14, for eps)."""
        given = given.drop(draws.keep)
        state = self.to_state(x, given)
        u = self.diffusion.perturb(state, draws.t, draws.eps)
        error = self.output(u, draws.t, given) - self._target(state, draws)
        return error.square().flatten(1).mean(1)

    def _target(self, state: torch.Tensor, draws: Draws) -> torch.Tensor:
        match self.config.prediction:
            case PredictionType.eps:
                return draws.eps
            case PredictionType.x0:
                return state
            case PredictionType.v:  # v = alpha eps - sigma x0
                alpha, sigma = self._scales(draws.t, state)
                return alpha * draws.eps - sigma * state

    def _scales(self, t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _column(self.diffusion.alpha(t), like), _column(self.diffusion.sigma(t), like)

    def predict(self, u: torch.Tensor, t: torch.Tensor, given: Given) -> tuple[torch.Tensor, torch.Tensor]:
        """(eps, y_0), both (B, k*C, H, W), from states u at times t (B,)."""
        output = self.output(u, t, given)
        if self.config.prediction is PredictionType.eps:
            return output, self.diffusion.x0_from_eps(u, t, output)
        if self.config.prediction is PredictionType.x0:
            return self.diffusion.eps_from_x0(u, t, output), output
        alpha, sigma = self._scales(t, u)
        return sigma * u + alpha * output, alpha * u - sigma * output

    def bind(self, given: Given, guidance: float = 0.0) -> Bound:
        """The model that a sampler integrates. Raises UserError where guidance was not trained for."""
        if guidance and not self.config.condition_dropout:
            raise UserError(
                f"guidance={guidance} needs a refiner trained with denoiser.condition_dropout above 0: use guidance=0"
            )
        return Bound(self, given, guidance)


class Bound:
    """A denoiser with its condition and guidance weight w: eps = (1 + w) eps(c) - w eps(0) (Ho & Salimans 2022)."""

    def __init__(self, denoiser: Denoiser, given: Given, guidance: float) -> None:
        self.denoiser = denoiser
        self.given = given
        self.guidance = guidance

    @property
    def diffusion(self) -> Diffusion:
        return self.denoiser.diffusion

    def __call__(self, u: torch.Tensor, t: float, *, clip: bool = False) -> Prediction:
        times = torch.full((len(u),), t, dtype=torch.float64)
        eps, x0 = self.denoiser.predict(u, times, self.given)
        if self.guidance:
            eps = (1 + self.guidance) * eps - self.guidance * self._unconditional(u, times)
            x0 = self.diffusion.x0_from_eps(u, times, eps)
        if clip:
            x0 = self.denoiser.to_state(self.denoiser.to_image(x0, self.given).clamp(-1.0, 1.0), self.given)
            eps = self.diffusion.eps_from_x0(u, times, x0)
        return Prediction(eps=eps, x0=x0, score=self.diffusion.score_from_eps(eps, times))

    def _unconditional(self, u: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """eps(0): without a condition there is no shift, so the same noisy image has another state."""
        nothing = self.given.drop(torch.zeros(len(u), dtype=torch.bool))
        alpha = _column(self.diffusion.alpha(t), u)
        moved = u + alpha * self.denoiser.data_scale * self.denoiser.shift(self.given)
        return self.denoiser.predict(moved, t, nothing)[0]
